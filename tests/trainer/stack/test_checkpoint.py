"""Checkpoints: what a killed run resumes from, and what is refused. The oracle is the whole run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch_xla
from safetensors import safe_open
from safetensors.torch import save_file

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, Saver
from trainer.flags import BadInput
from trainer.sharding import from_hosts, make_mesh, shard

PRESETS = Path(__file__).parents[3] / "trainer" / "presets"
STEPS = 40


def start(directory: Path, *flags: str, devices: int = 2, **changes) -> subprocess.Popen:
    """Start a run of STEPS steps that saves every 4; its output directory is ``directory/out``."""
    config = json.loads((PRESETS / "mixtral-tiny.json").read_text())
    config |= {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    config |= {"vocab_size": 320} | changes
    (directory / "config.json").write_text(json.dumps(config))
    command = [
        *(sys.executable, "-m", "trainer", "--do_train", "--output_dir", str(directory / "out")),
        *("--config_name", str(directory / "config.json"), "--dataset_name", "python-help"),
        *("--block_size", "64", "--per_device_train_batch_size", "8", "--static"),
        *("--max_steps", str(STEPS), "--learning_rate", "3e-3", "--warmup_steps", "3"),
        *("--save_strategy", "steps", "--save_steps", "4", *flags),
    ]
    environment = os.environ | {"PROFILE_LOGDIR": "", "CPU_NUM_DEVICES": str(devices)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(run: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = run.communicate(timeout=120)
    return run.returncode, stdout, stderr


def lines(directory: Path) -> list[dict]:
    path = directory / "out" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(directory: Path) -> list[float]:
    assert [line["step"] for line in lines(directory)] == list(range(len(lines(directory))))
    return [line["loss"] for line in lines(directory)]


def saved(directory: Path) -> list[int]:
    found = (directory / "out").glob("checkpoint-*")
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in found)


def wait_for(run: subprocess.Popen, directory: Path, step: int) -> None:
    while run.poll() is None and len(lines(directory)) < step:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the directory of a run that nothing interrupted; it kept two checkpoints."""
    directory = tmp_path_factory.mktemp("whole")
    code, _, stderr = finish(start(directory, "--save_total_limit", "2"))
    assert code == 0, stderr
    return directory


def test_the_whole_run_leaves_what_is_to_be_kept(whole):
    out = whole / "out"
    assert saved(whole) == [STEPS - 4, STEPS]
    assert not list(out.glob(".*"))
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(os.listdir(out))


def test_a_run_killed_at_random_moments_gives_the_losses_of_the_whole_one(whole, tmp_path):
    moments = random.Random(1)
    resumed = []
    for _ in range(3):
        run = start(tmp_path, "--resume_from_checkpoint", "auto")
        begun = max(saved(tmp_path), default=0)
        wait_for(run, tmp_path, begun + moments.randint(5, 11))
        time.sleep(moments.random() * 0.1)
        run.kill()
        _, stdout, stderr = finish(run)
        assert run.returncode == -signal.SIGKILL, stderr
        resumed.append(begun)
        assert (f"checkpoint-{begun}, after step {begun}" in stdout) == (begun > 0)
    assert resumed[0] < resumed[1] < resumed[2] < max(saved(tmp_path)) < STEPS
    code, _, stderr = finish(start(tmp_path, "--resume_from_checkpoint", "auto"))
    assert code == 0, stderr
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-6)
    assert not list((tmp_path / "out").glob(".*"))


def test_sigterm_saves_at_the_next_step_and_other_devices_go_on_from_it(whole, tmp_path):
    run = start(tmp_path, "--save_steps", "1000")
    wait_for(run, tmp_path, 5)
    run.terminate()
    code, stdout, stderr = finish(run)
    done = len(losses(tmp_path))
    assert code == 128 + signal.SIGTERM, stderr
    assert f"step {done} is saved" in stdout
    assert saved(tmp_path) == [done]
    assert 5 <= done < STEPS
    code, _, stderr = finish(start(tmp_path, "--resume_from_checkpoint", "auto", devices=1))
    assert code == 0, stderr
    # Sums over two devices are not, to the last bit, those over one.
    assert losses(tmp_path)[:done] == losses(whole)[:done]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-3)


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    run = start(
        *(tmp_path, "--save_steps", "1", "--save_total_limit", "1", "--learning_rate", "1e30"),
        *("--max_grad_norm", "0"),
    )
    code, _, stderr = finish(run)
    assert code == 1
    assert "training diverged" in stderr
    failed = lines(tmp_path)[-1]
    assert failed["loss"] is None
    # checkpoint-N holds the weights that the loss of step N is computed with. The first step's
    # learning rate is 0.
    assert saved(tmp_path) == [failed["step"] - 1]


def test_a_foreign_checkpoint_ends_the_run_before_it_compiles(whole, tmp_path):
    path = str(whole / "out" / f"checkpoint-{STEPS}")
    run = start(tmp_path, "--resume_from_checkpoint", path, intermediate_size=64)
    code, _, stderr = finish(run)
    assert code == 2
    assert stderr.startswith("error: ")
    assert (
        f"{path} was saved by a run whose intermediate_size is 96; of this run it is 64" in stderr
    )
    assert not (tmp_path / "out").exists()


IDENTITY = {"hidden_size": 64, "seed": 42}
SPECS = {"whole": (None, None), "rows": ("fsdp", None), "columns": ("tensor", "fsdp")}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(8, 16, generator=generator, dtype=dtype)
        for name, dtype in zip(SPECS, (torch.float32, torch.bfloat16, torch.float32), strict=True)
    }


def on_mesh(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: shard(v.to(torch_xla.device()), SPECS[n]) for n, v in values.items()}


@pytest.fixture
def written(tmp_path, devices) -> Path:
    """Return a checkpoint of ``tensors()``, saved from a mesh with two axes."""
    make_mesh(devices, tensor=2 if devices > 1 else 1)
    saver = Saver(tmp_path, on_mesh(tensors()), IDENTITY, every=1, keep=None)
    saver.save(7)
    saver.close()
    return tmp_path / "checkpoint-7"


def read_all(path: Path, identity=IDENTITY) -> dict[str, torch.Tensor]:
    saved = Checkpoint(path, identity)
    assert saved.step == 7
    found = {name: saved.read(name, value.shape) for name, value in tensors().items()}
    saved.check(on_mesh(found))
    return found


def test_what_one_mesh_saves_another_one_reads(written, devices):
    make_mesh(devices)
    for name, found in read_all(written).items():
        assert torch.equal(found, tensors()[name]), name


def test_every_part_is_written_once(written, devices):
    with safe_open(written / "state-00000-of-00001.safetensors", framework="pt") as file:
        names = list(file.keys())
    count = {name: sum(key.startswith(name) for key in names) for name in SPECS}
    assert count == {"whole": 1, "rows": max(1, devices // 2), "columns": devices}


def test_it_is_visible_when_complete_and_holds_the_state_it_was_asked_for(tmp_path, monkeypatch):
    go_on = threading.Event()
    flush = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (go_on.wait(10), flush(path)))
    state = on_mesh(tensors())
    saver = Saver(tmp_path, state, IDENTITY, every=1, keep=1)
    saver.save(7)
    for name, tensor in state.items():  # the next step, in place
        tensor.copy_(tensors(seed=1)[name].to(torch_xla.device()))
    torch_xla.sync(wait=True)
    assert checkpoint.find("auto", tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-7"]
    go_on.set()
    saver.close()
    assert checkpoint.find("auto", tmp_path) == tmp_path / "checkpoint-7"
    for name, found in read_all(tmp_path / "checkpoint-7").items():
        assert torch.equal(found, tensors()[name]), name


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path):
    saver = Saver(tmp_path / "gone", on_mesh(tensors()), IDENTITY, every=1, keep=None)
    saver.save(7)
    with pytest.raises(checkpoint.SaveFailed, match=r"checkpoint-7 cannot be written: .*No such"):
        saver.close()


def test_a_new_run_removes_what_comes_after_its_step(written):
    directory = written.parent
    shutil.copytree(written, directory / "checkpoint-70")
    (directory / ".checkpoint-8").mkdir()
    checkpoint.remove_after(directory, 7)
    assert [path.name for path in directory.iterdir()] == ["checkpoint-7"]


def refusal(path: Path, **changes) -> str:
    with pytest.raises(BadInput) as caught:
        read_all(path, IDENTITY | changes)
    return str(caught.value)


def test_no_flipped_bit_goes_unseen(written):
    (file,) = written.iterdir()
    good = file.read_bytes()
    moments = random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(8), *moments.sample(range(8, header), 40)]
    for place in (*places, *moments.sample(range(header, len(good)), 20), len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1 << moments.randrange(8)
        file.write_bytes(bad)
        try:
            found = read_all(written)
        except BadInput:
            continue
        # Only where nothing has changed: in the blanks that fill up the header.
        assert place < header
        assert all(torch.equal(found[n], value) for n, value in tensors().items()), place


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(written, size):
    (file,) = written.iterdir()
    file.write_bytes(file.read_bytes()[:size])
    message = refusal(written)
    assert f"{file} is damaged" in message
    assert "Delete checkpoint-7; resume from another checkpoint" in message


def test_another_run_s_checkpoint_is_refused(written):
    assert "whose hidden_size is 64; of this run it is 128" in refusal(written, hidden_size=128)
    assert "whose seed is 42; of this run it is 1" in refusal(written, seed=1)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    assert f"{tmp_path} is no checkpoint" in refusal(tmp_path)
    assert f"{tmp_path}/nowhere is no checkpoint" in refusal(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "state-00000-of-00001.safetensors")
    assert "is damaged" in refusal(tmp_path)


def test_tensors_of_other_shapes_are_refused(written):
    saved = Checkpoint(written, IDENTITY)
    for shape, said in (((8, 8), "does not fit"), ((8, 16, 1), "does not fit")):
        with pytest.raises(BadInput, match=said):
            saved.read("whole", torch.Size(shape))
    with pytest.raises(BadInput, match="has no absent"):
        saved.read("absent", torch.Size((8, 16)))
    larger = shard(torch.zeros(8, 32).to(torch_xla.device()), ("fsdp", None))
    with pytest.raises(BadInput, match=r"has not all of rows\[0:"):
        saved.check({"rows": larger})


def test_what_the_hosts_say_reaches_all_devices(devices):
    found = from_hosts(7)
    assert found.max().item() == found.min().item() == 7
    assert len(found) == devices
