"""What site.yml has brought goes, and what is the user's stays."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.slices.simulated_slice import SMALL_IMAGE, WORKERS, Playbook, Worker

HOME = "/home/tpu"
PROVISIONED = (
    f"test -e {HOME}/config.json",
    f"test -e {HOME}/fsdp_config.json",
    "docker image inspect mixtral-trainer-small:release",
    "docker container inspect mixtral-trainer",
    f"test -e {HOME}/mixtral-trainer/cache/file",
    f"test -e {HOME}/mixtral-trainer/ca.crt",
)
USERS = (
    f"test -e {HOME}/mixtral-trainer/runs/mine/metrics.jsonl",
    f"test -e {HOME}/notes.txt",
    "docker image inspect users-own",
    "docker version",
)


@pytest.fixture(scope="module", autouse=True)
def _provisioned(finished: Callable[..., Playbook]) -> Iterator[None]:
    assert finished("site.yml", **SMALL_IMAGE).code == 0
    for name in WORKERS:
        worker = Worker(name)
        worker.run(
            f"cd {HOME} && mkdir -p mixtral-trainer/runs/mine mixtral-trainer/cache && touch "
            "notes.txt mixtral-trainer/runs/mine/metrics.jsonl mixtral-trainer/cache/file "
            "mixtral-trainer/ca.crt",
            user="tpu",
        )
        worker.run(
            f"cd {HOME} && tar -c notes.txt | docker import - users-own "
            "&& docker rm --force mixtral-trainer 2> /dev/null; "
            "docker run --detach --init --name mixtral-trainer --label run_id=mine "
            "--entrypoint sleep mixtral-trainer-small:release 600"
        )
    yield
    for name in WORKERS:
        Worker(name).run(
            f"cd {HOME} && rm -r notes.txt mixtral-trainer/runs/mine && docker image rm users-own"
        )


def there(commands: tuple[str, ...]) -> list[bool]:
    return [Worker(name).answers(command) for name in WORKERS for command in commands]


@pytest.fixture
def reset(finished: Callable[..., Playbook]) -> Callable[..., Playbook]:
    return partial(finished, "reset.yml", **SMALL_IMAGE)


def test_without_a_word_nothing_goes(reset: Callable[..., Playbook]) -> None:
    run = reset()
    assert run.code != 0
    assert "run it again with -e confirm=true" in run.table
    assert all(there(PROVISIONED))


def test_check_mode_shows_what_would_go(reset: Callable[..., Playbook]) -> None:
    run = reset("--check")
    assert run.code == 0
    assert "changed=0" not in run.table
    assert all(there(PROVISIONED))


def test_only_what_was_brought_goes(reset: Callable[..., Playbook]) -> None:
    assert reset(confirm=True).code == 0
    assert not any(there(PROVISIONED))
    assert all(there(USERS))


def test_what_is_gone_need_not_go(reset: Callable[..., Playbook]) -> None:
    run = reset(confirm=True)
    assert run.code == 0
    assert run.table.count("changed=0") == len(WORKERS)


def test_it_can_be_provisioned_again(finished: Callable[..., Playbook]) -> None:
    assert finished("site.yml", **SMALL_IMAGE).code == 0
    assert all(there(PROVISIONED[:3]))
