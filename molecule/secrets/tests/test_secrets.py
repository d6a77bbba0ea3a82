"""A token goes through every playbook, loudly, and is then searched for everywhere.

It must be in one file on every worker, and after the reset in none.
"""

import io
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers.hub import Hub
from tests.slices.leaks import Watch, in_files, in_text
from tests.slices.simulated_slice import WORKERS, Playbook, Worker

TOKENIZER = "mistralai/Mixtral-8x7B-v0.1"
STORED = "/home/tpu/mixtral-trainer/hf/token"
# Of all layers only the one that the trainer has written; the others are of images.
LAYERS = "/var/lib/docker/overlay2"
LAYER = "docker inspect --format '{{.GraphDriver.Data.UpperDir}}' mixtral-trainer 2> /dev/null || :"
IMAGES = "docker images --all --quiet --no-trunc | sort"
ENGINE = """
docker ps --all --quiet | xargs --no-run-if-empty docker inspect
docker images --all --quiet | sort --unique | xargs --no-run-if-empty docker inspect
for image in $(docker images --quiet | sort --unique); do docker history --no-trunc $image; done
"""
JOURNAL = "journalctl --no-pager --output=export"


@dataclass
class Story:
    """What was run with which tokens, and what there was to find."""

    tokens: list[str]
    watch: Watch
    codes: dict[str, int] = field(default_factory=dict)
    screens: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    images: list[list[str]] = field(default_factory=list)
    brought_home: Path = Path()


def here(command: str) -> str:
    """Run a shell command on the controller."""
    return subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True).stdout


def files_of(worker: Worker, tokens: list[str]) -> set[str]:
    """Return the files of a worker that hold a token, whoever may read them."""
    root = f"/proc/{worker.machine.attrs['State']['Pid']}/root"
    found = in_files(tokens, Path(root), "/proc", "/sys", LAYERS)
    if layer := worker.run(LAYER).strip():
        found |= {f"{layer}{path}" for path in in_files(tokens, Path(root + layer))}
    return found


def may_know(pid: int, command: str) -> bool:
    """Tell whether a process is below this one: an ansible-playbook, which was given the token.

    So are the connections that ssh keeps open for it, until they go into the background.
    """
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return "ControlPersist" in command or command.endswith("[mux]")


@pytest.fixture(scope="module")
def story(
    hub: Hub, authority: tuple, guides: dict, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    """Everything that a token goes through, and what was found on the way."""
    workers = [Worker(name) for name in WORKERS]
    home = tmp_path_factory.mktemp("home")
    images = [here(IMAGES), *(worker.run(IMAGES) for worker in workers)]
    hub.add("org/gated", hub.repositories["model", TOKENIZER].files, gated=True)
    one, other = (hub.token(user, reads=[TOKENIZER]) for user in ("ada", "grace"))
    expired = hub.token(expired=True)
    tokens = [one, other, expired]
    story = Story(tokens, Watch(tokens, may_know), brought_home=home / "runs")
    variables = home / "variables.yml"
    variables.write_text(json.dumps({"hf_token": other}))
    reach = {"HF_ENDPOINT": hub.endpoint, "SSL_CERT_FILE": str(authority[1])}

    def play(title: str, name: str, *options: str, token: str = "", **more: object) -> None:
        run = Playbook(
            name, "-vvv", "--diff", *options,
            environment=reach | {"NO_PROXY": "127.0.0.1", "HF_TOKEN": token},
            **({"runs_dir": str(story.brought_home)} | guides | more),
        )  # fmt: skip
        # Thousands of lines
        with redirect_stdout(io.StringIO()):
            story.codes[title] = run.end()
        story.screens[title] = run.screen
        print(f"{title}: exit code {run.code}", flush=True)

    def look(title: str) -> None:
        story.files[title] = {it.name: files_of(it, story.tokens) for it in workers}

    with story.watch:
        play("site", "site.yml", token=one)
        play("train", "train.yml", token=one)
        play("a run that fails", "train.yml", token=one, tokenizer_name="org/gated")
        play("status", "status.yml", token=one)
        look("logged in")
        story.texts = {"the controller's engine": here(ENGINE)}
        for worker in workers:
            story.modes[worker.name] = worker.run(f"stat --format '%a %U' {STORED}").strip()
            story.texts[f"the engine of {worker.name}"] = worker.run(ENGINE)
        play("a login from a file", "site.yml", "--tags=login", f"--extra-vars=@{variables}")
        play("a login that fails", "site.yml", "--tags=login", token=expired)
        look("logged in anew")
        play("reset", "reset.yml", "--skip-tags=image", token=one, confirm=True)
        look("reset")
    for worker in workers:
        story.texts[f"the journal of {worker.name}"] = worker.run(JOURNAL)
    story.images = [images, [here(IMAGES), *(worker.run(IMAGES) for worker in workers)]]
    yield story
    # Who comes next finds the workers provisioned.
    assert Playbook("site.yml").end() == 0


def test_it_went_through_everything(story: Story, hub: Hub) -> None:
    failed = {title for title, code in story.codes.items() if code}
    assert failed == {"a run that fails", "a login that fails"}
    screen = " ".join(story.screens["a run that fails"].split())
    assert f"(403). Ask for access at {hub.endpoint}/org/gated" in screen
    assert "is expired" in story.screens["a login that fails"]
    assert all("ESTABLISH SSH CONNECTION" in story.screens[it] for it in ("site", "train"))
    assert hub.reads.count(("ada", f"{TOKENIZER}/tokenizer.json")) == len(WORKERS)


def test_no_playbook_prints_it(story: Story) -> None:
    assert not [title for title, text in story.screens.items() if in_text(story.tokens, text)]


def test_no_process_shows_it(story: Story) -> None:
    assert not story.watch.sights
    # The watch did see into the workers' containers.
    trainer = "/opt/venv/bin/python -m trainer"
    assert any(command.startswith(trainer) for command in story.watch.looked_into)


@pytest.mark.parametrize("title", ["logged in", "logged in anew"])
def test_one_file_on_every_worker_holds_it(story: Story, title: str) -> None:
    assert story.files[title] == {name: {STORED} for name in WORKERS}
    assert story.modes == dict.fromkeys(WORKERS, "600 tpu")


def test_the_reset_leaves_it_nowhere(story: Story) -> None:
    assert story.files["reset"] == {name: set() for name in WORKERS}


def test_no_engine_and_no_journal_holds_it(story: Story) -> None:
    assert not [title for title, text in story.texts.items() if in_text(story.tokens, text)]
    assert all("mixtral-trainer" in text for text in story.texts.values())


def test_no_image_is_younger_than_it(story: Story) -> None:
    # An image's id is the hash of all that is in it.
    before, after = story.images
    assert before == after


def test_what_comes_home_does_not_hold_it(story: Story) -> None:
    assert list(story.brought_home.glob("*/workers/*/trainer.log"))
    assert not in_files(story.tokens, story.brought_home)
    assert not in_files(story.tokens, Path.home() / ".ansible")


def test_what_is_there_is_found(w1: Worker) -> None:
    planted = f"hf_{secrets.token_hex(17)}"
    with Watch([planted]) as watch:
        w1.run(f"sleep 1; : {planted}", environment={"PLANTED": planted})
    assert {place for place, _ in watch.sights} == {"cmdline", "environ"}
    w1.run(
        f"echo {planted} > /var/tmp/planted; echo {planted} | base64 >> /root/.bash_history;"
        f"logger {planted}; docker rm --force mixtral-trainer 2> /dev/null;"
        "docker run --name mixtral-trainer --entrypoint sh --env PLANTED="
        f"{planted} mixtral-trainer:release -c 'echo {planted} > /planted'"
    )
    try:
        layer = w1.run(LAYER).strip()
        found = files_of(w1, [planted])
        assert {"/var/tmp/planted", "/root/.bash_history", f"{layer}/planted"} <= found
        assert in_text([planted], w1.run(ENGINE))
        assert in_text([planted], w1.run(JOURNAL))
    finally:
        w1.run("rm /var/tmp/planted /root/.bash_history; docker rm --force mixtral-trainer")
