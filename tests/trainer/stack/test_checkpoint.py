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
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_xla
import torch_xla.runtime as xr
from safetensors.torch import load, save

from tests.servers.cloud_storage import CloudStorage
from tests.servers.faults import Fault
from trainer import checkpoint, storage
from trainer.checkpoint import Checkpoint, SaveFailed, Saver
from trainer.flags import BadInput
from trainer.sharding import from_hosts, make_mesh, shard
from trainer.storage import Bucket, Directory, at

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
    stdout, stderr = run.communicate(timeout=900)
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
    run = start(tmp_path, "--save_steps", "3", "--save_total_limit", "1")
    wait_for(run, tmp_path, 5)
    run.terminate()
    code, stdout, stderr = finish(run)
    done = len(losses(tmp_path))
    assert code == 128 + signal.SIGTERM, stderr
    assert f"step {done} is saved" in stdout
    # No loss has proved the newest one good yet.
    assert saved(tmp_path) == [(done - 1) // 3 * 3, done]
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


@pytest.fixture(scope="module")
def cloud() -> Iterator[CloudStorage]:
    """The storage that there is for tensorstore's client, which logs in once in a process."""
    with pytest.MonkeyPatch.context() as patch, CloudStorage() as cloud:
        for name, value in cloud.environment.items():
            patch.setenv(name, value)
        yield cloud


@pytest.fixture
def bucket(cloud) -> Iterator[dict[str, bytes]]:
    """The objects of my-bucket; it is empty, and everything may be done there."""
    cloud.buckets = {"my-bucket": {}}
    cloud.requests.clear()
    yield cloud.buckets["my-bucket"]
    cloud.faults.clear()
    cloud.denied.clear()
    cloud.page = 1000


PATH = "gs://my-bucket/runs/mine"
IN_BUCKET = ("--checkpoint_bucket", PATH, "--save_total_limit", "2")


def steps_in(bucket: dict[str, bytes]) -> set[str]:
    return {name.split("/")[2] for name in bucket}


def test_a_run_killed_while_it_uploads_is_resumed_from_what_is_complete(
    whole, tmp_path, cloud, bucket
):
    cloud.faults.append(Fault("POST .*/checkpoint-12/", status=None))
    cloud.stuck.clear()
    run = start(tmp_path, *IN_BUCKET)
    assert cloud.stuck.wait(900)
    run.kill()
    finish(run)
    assert steps_in(bucket) == {"checkpoint-4", "checkpoint-8"}
    assert saved(tmp_path) == []
    # Another machine goes on, which has nothing of what the first one had on its disk.
    shutil.rmtree(tmp_path / "out")
    code, stdout, stderr = finish(start(tmp_path, *IN_BUCKET, "--resume_from_checkpoint", "must"))
    assert code == 0, stderr
    assert f"resuming from {PATH}/checkpoint-8, after step 8" in stdout
    found = [line["loss"] for line in lines(tmp_path)]
    assert found == pytest.approx(losses(whole)[8:], abs=1e-6)
    assert steps_in(bucket) == {f"checkpoint-{STEPS - 4}", f"checkpoint-{STEPS}"}


def test_a_bucket_that_may_not_be_written_to_ends_the_run_before_it_compiles(
    tmp_path, cloud, bucket
):
    cloud.denied.add("create")
    code, _, stderr = finish(start(tmp_path, *IN_BUCKET))
    assert code == 2
    assert f"error: {PATH}: PERMISSION_DENIED: trainer@my-project" in stderr
    assert "Give this account roles/storage.objectUser on the bucket" in stderr
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


@pytest.fixture(params=["directory", "bucket"])
def place(request, tmp_path) -> Directory | Bucket:
    """Return where checkpoints go."""
    if request.param == "bucket":
        request.getfixturevalue("bucket")
    return at(tmp_path if request.param == "directory" else PATH)


def save_at(place: Directory | Bucket, *steps: int, keep: int | None = None) -> None:
    """Save ``tensors()`` from a mesh with two axes."""
    devices = xr.global_runtime_device_count()
    make_mesh(devices, tensor=2 if devices > 1 else 1)
    saver = Saver(place, on_mesh(tensors()), IDENTITY, every=1, keep=keep)
    for step in steps:
        saver.save(step)
    saver.close()


@pytest.fixture
def written(place) -> Directory | Bucket:
    """Return a checkpoint of ``tensors()``, which is one file."""
    save_at(place, 7)
    return place / "checkpoint-7"


def content(place: Directory | Bucket, cloud: CloudStorage) -> dict[str, bytes]:
    """Return the files of a checkpoint, by name."""
    if isinstance(place, Directory):
        return {path.name: path.read_bytes() for path in place.path.iterdir()}
    prefix = f"{place.url}/".removeprefix("gs://my-bucket/")
    objects = cloud.buckets["my-bucket"]
    return {n.removeprefix(prefix): data for n, data in objects.items() if n.startswith(prefix)}


def put(place: Directory | Bucket, cloud: CloudStorage, file: str, data: bytes) -> None:
    """Make ``data`` the content of one file of a checkpoint."""
    if isinstance(place, Directory):
        (place.path / file).write_bytes(data)
    else:
        cloud.buckets["my-bucket"][f"{place.url}/{file}".removeprefix("gs://my-bucket/")] = data


def read_all(place: Directory | Bucket, identity=IDENTITY) -> dict[str, torch.Tensor]:
    saved = Checkpoint(at(str(place)), identity)
    assert saved.step == 7
    found = {name: saved.read(name, value.shape) for name, value in tensors().items()}
    saved.check(on_mesh(found))
    return found


def test_what_one_mesh_saves_another_one_reads(written, devices):
    make_mesh(devices)
    for name, found in read_all(written).items():
        assert torch.equal(found, tensors()[name]), name


def test_every_part_is_written_once(written, cloud, devices):
    (data,) = content(written, cloud).values()
    count = {name: sum(key.startswith(name) for key in load(data)) for name in SPECS}
    assert count == {"whole": 1, "rows": max(1, devices // 2), "columns": devices}


def test_it_is_visible_when_complete_and_holds_the_state_it_was_asked_for(tmp_path, monkeypatch):
    go_on = threading.Event()
    flush = storage._flush
    monkeypatch.setattr(storage, "_flush", lambda path: (go_on.wait(900), flush(path)))
    place, state = Directory(tmp_path), on_mesh(tensors())
    saver = Saver(place, state, IDENTITY, every=1, keep=1)
    saver.save(7)
    for name, tensor in state.items():  # the next step, in place
        tensor.copy_(tensors(seed=1)[name].to(torch_xla.device()))
    torch_xla.sync(wait=True)
    assert checkpoint.find("auto", place) is None
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-7"]
    go_on.set()
    saver.close()
    complete = checkpoint.find("auto", place)
    assert str(complete) == str(tmp_path / "checkpoint-7")
    for name, found in read_all(complete).items():
        assert torch.equal(found, tensors()[name]), name


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path):
    place = Directory(tmp_path / "gone")
    saver = Saver(place, on_mesh(tensors()), IDENTITY, every=1, keep=None)
    saver.save(7)
    with pytest.raises(SaveFailed, match=r"checkpoint-7 cannot be written: .*No such"):
        saver.close()


def test_a_new_run_removes_what_comes_after_its_step(written):
    directory = written.path.parent if isinstance(written, Directory) else None
    place = at(str(written).rpartition("/")[0])
    save_at(place, 70)
    if directory:
        (directory / ".checkpoint-8").mkdir()
    checkpoint.remove_after(place, 7)
    assert place.checkpoints() == [7]
    if directory:
        assert [path.name for path in directory.iterdir()] == ["checkpoint-7"]


def refusal(place: Directory | Bucket, **changes) -> str:
    with pytest.raises(BadInput) as caught:
        read_all(place, IDENTITY | changes)
    return str(caught.value)


def test_no_flipped_bit_goes_unseen(written, cloud):
    ((file, good),) = content(written, cloud).items()
    moments = random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(8), *moments.sample(range(8, header), 40)]
    places += [*moments.sample(range(header, len(good)), 20), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << moments.randrange(8)
        put(written, cloud, file, bytes(bad))
        try:
            found = read_all(written)
        except BadInput:
            continue
        # Only where nothing has changed: in the blanks that fill up the header.
        assert place < header
        assert all(torch.equal(found[n], value) for n, value in tensors().items()), place


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(written, cloud, size):
    ((file, good),) = content(written, cloud).items()
    put(written, cloud, file, good[:size])
    message = refusal(written)
    assert f"{written}/{file} is damaged" in message
    assert "Delete checkpoint-7; resume from another checkpoint" in message


def test_another_run_s_checkpoint_is_refused(written):
    assert "whose hidden_size is 64; of this run it is 128" in refusal(written, hidden_size=128)
    assert "whose seed is 42; of this run it is 1" in refusal(written, seed=1)


def test_a_place_without_a_checkpoint_is_refused(place, cloud):
    assert f"{place} is no checkpoint" in refusal(place)
    assert f"{place}/nowhere is no checkpoint" in refusal(place / "nowhere")
    put(place, cloud, "state-00000-of-00001.safetensors", save({"a": torch.zeros(1)}))
    assert "is damaged" in refusal(place)


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


def test_no_more_are_kept_than_asked_for(place):
    save_at(place, 4, 8, 12, 16, keep=2)
    assert place.checkpoints() == [12, 16]


def test_of_several_hosts_none_removes_before_all_have_written(tmp_path, monkeypatch):
    """Else a kill could leave them without a checkpoint in common."""
    place = Directory(tmp_path)
    asked = []

    def wait_for_hosts(value: float) -> torch.Tensor:
        asked.append(place.checkpoints())
        return torch.zeros(1)

    monkeypatch.setattr(checkpoint.xr, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint, "from_hosts", wait_for_hosts)
    save_at(place, 4, 8, 12, keep=1)
    assert asked == [[], [4], [4, 8], [8, 12]]
    assert place.checkpoints() == [12]


def test_there_must_be_one_where_there_must_be_one(place):
    assert checkpoint.find("auto", place) is None
    with pytest.raises(BadInput, match=f"must be a checkpoint .*, and {place} has no complete one"):
        checkpoint.find("must", place)
    save_at(place, 7)
    assert str(checkpoint.find("must", place)) == f"{place}/checkpoint-7"


def test_a_bucket_s_objects_are_small_and_all_of_them_are_needed(cloud, bucket, monkeypatch):
    monkeypatch.setattr(storage, "PART_BYTES", 300)
    cloud.page = 2
    place = at(PATH)
    save_at(place, 4)
    save_at(place, 7)
    files = content(place / "checkpoint-7", cloud)
    assert len(files) > 2
    for shards in map(load, files.values()):
        assert len(shards) == 1 or sum(shard.nbytes for shard in shards.values()) <= 300
    for name, found in read_all(place / "checkpoint-7").items():
        assert torch.equal(found, tensors()[name]), name
    for file in files:
        data = bucket.pop(f"runs/mine/checkpoint-7/{file}")
        assert str(checkpoint.find("auto", place)) == f"{PATH}/checkpoint-4"
        bucket[f"runs/mine/checkpoint-7/{file}"] = data
    assert str(checkpoint.find("auto", place)) == f"{PATH}/checkpoint-7"


def test_only_what_is_left_of_its_own_checkpoints_is_removed(cloud, bucket, monkeypatch):
    monkeypatch.setattr(storage, "PART_BYTES", 300)
    place = at(PATH)
    save_at(place, 4, 8)
    others = {
        f"runs/{name}": b"somebody's"
        for name in ("mine/model.safetensors", "mine/checkpoint-9/model.safetensors", "x")
    }
    bucket |= others
    bucket.pop(next(name for name in bucket if "checkpoint-8/" in name))
    checkpoint.remove_after(place, 4)
    assert place.checkpoints() == [4]
    left = {name for name in bucket if "mine/checkpoint-4/" not in name}
    assert left == others.keys()


def test_a_checkpoint_is_the_same_in_a_directory_and_in_a_bucket(cloud, bucket, tmp_path):
    save_at(at(PATH), 7)
    save_at(at(tmp_path), 7)
    copy = at(tmp_path / "copy")
    copy.path.mkdir()
    for file, data in content(at(f"{PATH}/checkpoint-7"), cloud).items():
        put(copy, cloud, file, data)
    for file, data in content(at(tmp_path / "checkpoint-7"), cloud).items():
        put(at("gs://my-bucket/copy/checkpoint-7"), cloud, file, data)
    assert at("gs://my-bucket/copy").checkpoints() == [7]
    for place in (copy, at("gs://my-bucket/copy/checkpoint-7")):
        for name, found in read_all(place).items():
            assert torch.equal(found, tensors()[name]), name


@pytest.mark.parametrize(
    ("place", "denied", "said"),
    [
        (
            "gs://my-bukcet/a",
            "",
            "gs://my-bukcet/a: NOT_FOUND: The specified bucket does not exist",
        ),
        (PATH, "list", f"{PATH}: PERMISSION_DENIED: trainer@.*objects.list.*storage.objectUser"),
        (PATH, "create", f"{PATH}: PERMISSION_DENIED: trainer@.*objects.create.*objectUser"),
        (PATH, "delete", f"{PATH}: PERMISSION_DENIED: trainer@.*objects.delete.*objectUser"),
    ],
)
def test_what_the_storage_refuses_is_said_before_there_is_anything_to_save(
    cloud, bucket, place, denied, said
):
    cloud.denied |= {denied}
    with pytest.raises(BadInput, match=said):
        at(place).check(new=True)


def test_a_bucket_is_left_as_it_was_found(cloud, bucket):
    at(PATH).check(new=True)
    assert not bucket
    save_at(at(PATH), 7)
    with pytest.raises(
        BadInput, match=f"{PATH} holds the checkpoints .*, up to checkpoint-7; give"
    ):
        at(PATH).check(new=True)
    at(PATH).check(new=False)
    assert at(PATH).checkpoints() == [7]


def test_who_is_not_known_any_more_is_told(cloud, bucket, monkeypatch):
    monkeypatch.setattr(cloud, "token", "another")
    with pytest.raises(BadInput, match=r"Invalid Credentials\. .* a TPU VM needs a service"):
        at(PATH).check(new=True)


def test_a_bad_minute_of_the_storage_is_survived_and_a_refusal_is_named(cloud, bucket):
    cloud.faults.append(Fault("POST .*/checkpoint-4/", 503))
    save_at(at(PATH), 4)
    assert at(PATH).checkpoints() == [4]
    assert sum("POST" in request for request in cloud.requests) == 2
    cloud.denied.add("delete")
    with pytest.raises(SaveFailed, match=rf"oldest .* cannot be removed: {PATH}: .*\.delete"):
        save_at(at(PATH), 8, keep=1)
    cloud.denied.add("create")
    with pytest.raises(SaveFailed, match=rf"{PATH}/checkpoint-9 cannot be written: .*\.create"):
        save_at(at(PATH), 9)


@pytest.fixture
def as_host(monkeypatch, devices):
    """Return a function that makes this process one of two hosts, each with half of the devices."""
    calls = ("_get_local_shards", "_get_local_shard_replica_and_indices")
    real = {name: getattr(torch_xla._XLAC, name) for name in calls}

    def become(index: int) -> None:
        own = slice(index * devices // 2, (index + 1) * devices // 2)
        monkeypatch.setattr(xr, "process_index", lambda: index)
        monkeypatch.setattr(xr, "process_count", lambda: 2)
        for name in calls:
            monkeypatch.setattr(
                *(torch_xla._XLAC, name),
                lambda of, name=name: [shards[own] for shards in real[name](of)],
            )

    return become


def test_in_a_bucket_two_hosts_write_one_checkpoint_and_each_reads_its_own(
    cloud, bucket, as_host, monkeypatch
):
    for host in (0, 1):
        as_host(host)
        assert checkpoint.find("auto", at(PATH)) is None
        save_at(at(PATH), 7)
    files = content(at(f"{PATH}/checkpoint-7"), cloud)
    keys = [key for data in files.values() for key in load(data)]
    assert len(keys) == len(set(keys))
    found = checkpoint.find("auto", at(PATH))
    for host, rows in ((0, slice(0, 4)), (1, slice(4, 8))):
        as_host(host)
        cloud.requests.clear()
        saved = Checkpoint(at(str(found)), IDENTITY)
        headers = len(cloud.requests)
        for name, value in tensors().items():
            whole = saved.read(name, value.shape, ("fsdp", None))
            assert torch.equal(whole[rows], value[rows]), name
        # The one shard of `whole`, and of the others what overlaps these rows
        assert len(cloud.requests) - headers < len(keys)
        saved.check(on_mesh(tensors()))
    monkeypatch.undo()


def test_what_the_hosts_say_reaches_all_devices(devices):
    found = from_hosts(7)
    assert found.max().item() == found.min().item() == 7
    assert len(found) == devices
