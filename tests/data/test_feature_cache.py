"""The feature cache: equal to the live model, keyed by all that matters, refused if it is something else."""

import multiprocessing
import os
import re
import shutil
import signal
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.synthetic_dataset import CAMERAS, write_dataset
from tests.training_runs import tiny_backbone, tiny_policy, tiny_run
from vega_policy.data import feature_cache as features
from vega_policy.data.dataset import DatasetConfig, DatasetError, match_features, read_table
from vega_policy.data.feature_cache import CacheError, check_cacheable
from vega_policy.data.loader import ShuffledRows, VideoSource
from vega_policy.data.video import FrameRows, frames_in_order
from vega_policy.model.config import BackboneConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.run_dir import DiskFullError, FolderInUseError
from vega_policy.training.train import cache_streams, load_data, make_source, train


@pytest.fixture(scope="module")
def loaded(root, tmp_path_factory):
    """A policy and its data."""
    config = tiny_run(root, tmp_path_factory.mktemp("runs") / "run")
    data = load_data(config)
    torch.manual_seed(0)
    return config, VegaPolicy(config.vega), data


def streams(policy, names, **changed):
    dataset = {"repo_id": "tests/synthetic", "metadata": "0"} | changed
    return features.streams_of(policy.model, dataset, list(CAMERAS), names)


def decoded(data, workers=0):
    frames = FrameRows(data.parts[0].dataset, data.table, list(CAMERAS), "pyav")
    return VideoSource(data.table, frames, chunk_size=4, workers=workers, seed=0)


LENGTHS = (9, 6, 12)  # of the episodes of `write_dataset`


def build(policy, data, folder, names=("frames", "semantic", "prior"), read=None, **part):
    wanted = streams(policy, names)
    read = read or partial(frames_in_order, data.parts[0].dataset, list(CAMERAS), "pyav")
    features.build_streams(folder, wanted, policy.model, read, LENGTHS, **part)
    return wanted


def content(folder):
    """The bytes of all files of a cache by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*") if path.is_file()}


def refuse_to_read(episodes):
    assert not episodes, f"episodes {list(episodes)} are read again"
    return ()


def test_cached_features_are_those_of_the_live_model(loaded, tmp_path):
    config, policy, data = loaded
    videos = decoded(data)
    cached, _ = make_source(config, policy, data, None)
    rows = torch.tensor([3, 26, 11])
    live, batch = policy.observe(videos.batch(rows)), cached.batch(rows)
    with torch.no_grad():
        semantic, prior = policy.model.semantic_features(live), policy.model.prior_features(live)
    for expected, found in ((semantic, batch["vega.semantic"]), (prior, batch["vega.prior"])):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-3)
    assert not torch.allclose(semantic[0], semantic[1], atol=1e-3)


def test_each_core_encodes_batches_of_its_own_and_the_rows_stay_in_order(loaded, tmp_path, monkeypatch):
    _, policy, data = loaded
    monkeypatch.setitem(features.BATCH, "cpu", 2)  # several batches an episode
    encode, threads = policy.model.backbone.encode, []

    def note(frames):
        threads.append((threading.current_thread().name, torch.get_num_threads()))
        return encode(frames)

    monkeypatch.setattr(policy.model.backbone, "encode", note)
    before = torch.get_num_threads()
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            build(policy, data, tmp_path / str(cores))
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    workers = [one for one in threads if one[0].startswith("in_parallel")]
    assert len(set(workers)) > 1
    assert {count for _, count in workers} == {1}


def test_cached_frames_give_the_batches_of_decoded_videos(root, tmp_path):
    policy = tiny_policy(backbone=tiny_backbone(freeze_image_encoder=False))
    config = tiny_run(
        root, tmp_path / "run", policy=policy, dataset={"cached": ["frames", "prior"], "cache": "disk"}
    )
    data = load_data(config)
    policy = VegaPolicy(config.vega)
    cached, _ = make_source(config, policy, data, None)
    videos = decoded(data)
    rows = torch.tensor([0, 8, 9, 20])
    expected, found = videos.batch(rows), cached.batch(rows)
    for key in ("observation.state", "action", "action_is_pad"):
        assert torch.equal(expected[key], found[key])
    assert expected["task"] == found["task"]
    live, stored = policy.observe(expected).frames, policy.observe(found).frames
    assert stored.dtype == torch.uint8
    torch.testing.assert_close(stored.float() / 255, live, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize("cached", [["frames"], ["semantic", "prior"]])
def test_a_stride_keeps_every_second_instant_of_each_episode_and_all_actions(root, tmp_path, cached):
    """Episodes of 9, 6 and 12 frames."""
    fields = {"cached": cached, "held_out": 0.5}
    full, half = (
        tiny_run(root, tmp_path / "run", dataset=fields | {"frame_stride": stride}) for stride in (1, 2)
    )
    data, thinned = load_data(full), load_data(half)
    assert thinned.rows.tolist() == [0, 2, 4, 6, 8]
    assert thinned.held_out.tolist() == [9, 11, 13, *range(15, 27, 2)]
    torch.manual_seed(0)
    policy = VegaPolicy(full.vega)
    expected, found = make_source(full, policy, data, None)[0], make_source(half, policy, thinned, None)[0]
    rows = torch.tensor([15, 8, 25])
    expected, found = expected.batch(rows), found.batch(rows)
    assert expected.keys() == found.keys()
    for key in ("observation.state", "action", "action_is_pad"):
        assert torch.equal(expected[key], found[key])
    for name in cached:
        torch.testing.assert_close(found[f"vega.{name}"], expected[f"vega.{name}"], rtol=2**-7, atol=1e-3)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob(f"{cached[0]}-*/values.bin"))
    assert sizes[0] / sizes[1] == (5 + 3 + 6) / 27


def test_with_a_stride_of_1_nothing_changes_for_a_cache(loaded, tmp_path):
    _, policy, data = loaded
    assert data.table.every(1).all()
    names = ["frames", "semantic", "prior"]
    assert streams(policy, names) == features.streams_of(
        policy.model, {"repo_id": "tests/synthetic", "metadata": "0"}, list(CAMERAS), names, stride=1
    )
    assert "frame_stride" not in streams(policy, names)[0].key
    with pytest.raises(ValueError, match=r"dataset\.frame_stride: expected at least 1; got 0"):
        DatasetConfig(repo_id="tests/synthetic", frame_stride=0)


def test_datasets_of_pictures_are_read_like_those_of_videos(tmp_path):
    root = write_dataset(tmp_path / "images", use_videos=False, lengths=(3, 2))
    data = load_data(tiny_run(root, tmp_path / "run"))
    (first, second) = frames_in_order(data.parts[0].dataset, list(CAMERAS), "pyav")
    assert {key: (tuple(clip.shape), clip.dtype) for key, clip in second.items()} == {
        CAMERAS[0]: ((2, 3, 48, 64), torch.uint8),
        CAMERAS[1]: ((2, 3, 32, 32), torch.uint8),
    }
    assert first[CAMERAS[1]].unique().tolist() == [40, 60, 180, 220]


def test_a_built_cache_is_not_built_again(loaded, tmp_path):
    _, policy, data = loaded
    wanted = build(policy, data, tmp_path)
    build(policy, data, tmp_path, read=refuse_to_read)
    values = features.open_stream(tmp_path, wanted[0], len(data.table), None)
    assert values.shape == (27, 2, 3, 32, 32)


def test_a_built_cache_is_read_where_nothing_can_be_written(loaded, tmp_path, monkeypatch):
    _, policy, data = loaded
    wanted = build(policy, data, tmp_path)

    def refuse(*arguments, **options):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("vega_policy.data.feature_cache.lock_folder", refuse)
    assert build(policy, data, tmp_path, read=refuse_to_read) == wanted


def test_a_cache_that_does_not_fit_is_refused_with_its_bytes_and_leaves_nothing(
    loaded, tmp_path, monkeypatch
):
    _, policy, data = loaded
    monkeypatch.setattr("vega_policy.run_dir.free_space", lambda path: 1000)
    size = 27 * 2 * 3 * 32 * 32
    with pytest.raises(
        DiskFullError, match=rf"the cache of 27 frames takes about {size} bytes, and 1000 are"
    ):
        build(policy, data, tmp_path, ["frames"])
    assert list(tmp_path.glob("[a-z]*")) == []


def test_decoding_processes_need_shared_memory_for_their_batches(loaded, monkeypatch):
    _, _, data = loaded
    videos = decoded(data, workers=2)
    monkeypatch.setattr("vega_policy.data.loader.free_space", lambda path: 65536)
    with pytest.raises(ValueError, match=r"workers=2 needs about \d+ bytes of shared memory.*has 65536 free"):
        next(videos.stream(ShuffledRows(data.rows, 5, seed=0), 0))


def test_videos_that_are_replaced_under_the_same_names_are_another_cache(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    config = tiny_run(copy, tmp_path / "run")
    before = load_data(config).parts[0]
    policy = VegaPolicy(config.vega)
    old = cache_streams(before, policy)
    assert cache_streams(load_data(config).parts[0], policy) == old
    first, second = (next((copy / "videos" / camera).rglob("*.mp4")) for camera in CAMERAS)
    shutil.copy(second, first)
    new = cache_streams(load_data(config).parts[0], policy)
    assert not {stream.folder for stream in old} & {stream.folder for stream in new}


def test_a_missing_stream_is_added_to_a_cache(loaded, tmp_path):
    _, policy, data = loaded
    build(policy, data, tmp_path, ["semantic"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("semantic-*/*")}
    build(policy, data, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("semantic-*/*")} == before
    assert len(list(tmp_path.glob("*-*/manifest.json"))) == 3


def test_a_killed_build_continues_after_the_episodes_that_it_recorded(loaded, tmp_path, monkeypatch):
    _, policy, data = loaded
    whole, again = tmp_path / "whole", tmp_path / "again"
    build(policy, data, whole)
    monkeypatch.setattr(features, "RECORD_EVERY", 0.0)
    read = []

    def recording(episodes):
        read.extend(episodes)
        return frames_in_order(data.parts[0].dataset, list(CAMERAS), "pyav", episodes)

    def killed(episodes):
        for number, clip in enumerate(recording(episodes)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield clip

    child = multiprocessing.get_context("fork").Process(
        target=build, args=(policy, data, again), kwargs={"read": killed}
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not list(again.glob("*/manifest.json"))
    build(policy, data, again, read=recording)
    assert read == [2]  # episodes 0 and 1 are not encoded again
    assert content(again) == content(whole)


@pytest.mark.parametrize("step", ["shutil.rmtree", "complete_folder"])
def test_a_build_that_is_killed_while_it_is_completed_encodes_nothing_again(
    loaded, tmp_path, monkeypatch, step
):
    _, policy, data = loaded
    whole, again = tmp_path / "whole", tmp_path / "again"
    build(policy, data, whole)

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"vega_policy.data.feature_cache.{step}", die)
        with pytest.raises(KeyboardInterrupt):
            build(policy, data, again)
    assert not list(again.glob("*[0-9a-f]/manifest.json"))
    build(policy, data, again, read=refuse_to_read)
    assert content(again) == content(whole)


def test_parts_built_by_several_commands_are_the_cache_of_one(loaded, tmp_path):
    _, policy, data = loaded
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    build(policy, data, whole)
    build(policy, data, parts, shard=1, shards=2)
    assert not list(parts.glob("*/manifest.json"))
    build(policy, data, parts, shard=1, shards=2, read=refuse_to_read)
    build(policy, data, parts, shard=0, shards=2)
    assert content(parts) == content(whole)
    assert len(content(whole)) == 9


def test_a_whole_build_takes_over_what_parts_have_left(loaded, tmp_path):
    _, policy, data = loaded
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    build(policy, data, whole)
    build(policy, data, parts, shard=2, shards=3)
    build(policy, data, parts)
    assert content(parts) == content(whole)


def test_a_part_is_refused_while_it_or_one_of_another_division_is_built(loaded, tmp_path):
    _, policy, data = loaded
    inside = []

    def meanwhile(episodes):
        if not episodes:  # before the build
            return ()
        for shard, shards in ((0, 2), (2, 3)):
            with pytest.raises(FolderInUseError, match="0_of_2 is in use by process"):
                build(policy, data, tmp_path, shard=shard, shards=shards)
            inside.append(shard)
        build(policy, data, tmp_path, shard=1, shards=2)  # the other part is free
        return frames_in_order(data.parts[0].dataset, list(CAMERAS), "pyav", episodes)

    build(policy, data, tmp_path, shard=0, shards=2, read=meanwhile)
    assert inside == [0, 2]
    assert len(list(tmp_path.glob("*/manifest.json"))) == 3


def test_stop_after_0_says_what_it_writes_builds_the_cache_and_starts_no_run(root, tmp_path, caplog):
    fields = {"stop_after": 0, "dataset": {"cache": "disk"}}
    first, second = (tiny_run(root, tmp_path / "run", shards=2, shard=shard, **fields) for shard in (0, 1))
    with caplog.at_level("INFO"):
        assert train(first) == tmp_path / "cache"
    assert f"Caching 21 frames in {tmp_path / 'cache'} (part 0 of 2; 0 frames are done)" in caplog.text
    announced = re.search(r"semantic (\S+) GB, prior (\S+) GB; \S+ GB free", caplog.text)
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    train(second)
    for name, figure in zip(("semantic", "prior"), announced.groups(), strict=True):
        (values,) = (tmp_path / "cache").glob(f"{name}-*/values.bin")
        assert float(figure) * 1e9 == pytest.approx(values.stat().st_size * 21 / 27, rel=0.01)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"stop_after=0 builds the cache, and dataset\.cache is none"):
        train(tiny_run(root, tmp_path / "run", stop_after=0, dataset={"cache": "none"}))
    with pytest.raises(ValueError, match=r"shards divides the building of the cache\. Add stop_after=0"):
        tiny_run(root, tmp_path / "run", shards=2)
    with pytest.raises(ValueError, match=r"shard: expected a number from 0 to 1; got 2"):
        tiny_run(root, tmp_path / "run", shards=2, shard=2, stop_after=0)


def test_a_truncated_cache_is_refused(loaded, tmp_path):
    _, policy, data = loaded
    (stream,) = build(policy, data, tmp_path, ["semantic"])
    values = tmp_path / stream.folder / "values.bin"
    values.write_bytes(values.read_bytes()[:-2])
    with pytest.raises(CacheError, match=r"truncated.*expected \d+ bytes for 27 frames, found \d+.*Delete"):
        features.open_stream(tmp_path, stream, 27, None)


def test_a_cache_of_other_inputs_is_refused(loaded, tmp_path):
    _, policy, data = loaded
    (stream,) = build(policy, data, tmp_path, ["semantic"])
    other = streams(policy, ["semantic"], metadata="1")[0]
    (tmp_path / stream.folder).rename(tmp_path / other.folder)
    with pytest.raises(CacheError, match=r"other inputs: dataset differ"):
        features.open_stream(tmp_path, other, 27, None)


def test_another_prior_seed_frame_size_encoder_or_dataset_is_another_cache(loaded):
    config, policy, _ = loaded

    def folders(seed=0, **changed):
        torch.manual_seed(seed)  # of the encoders' random weights; 0 is the seed of `policy`
        other = VegaPolicy(replace_config(config.vega, **changed))
        return [stream.folder for stream in streams(other, ["semantic", "prior"])]

    semantic, prior = folders()
    assert [semantic, prior] == [stream.folder for stream in streams(policy, ["semantic", "prior"])]
    other_semantic, other_prior = folders(prior=PriorConfig(name="random", seed=1))
    assert other_semantic == semantic  # an ablation of the prior keeps the semantic cache
    assert other_prior != prior
    assert folders(seed=1)[0] != semantic
    assert folders(seed=1)[1] == prior
    assert semantic not in folders(frame_size=48)
    assert semantic != streams(policy, ["semantic"], metadata="1")[0].folder


def test_a_cached_future_is_the_live_one_of_each_frames_instruction(loaded, tmp_path, monkeypatch):
    def encoder():
        return lambda sentences: [torch.full((2, 384), len(text) / 8) for text in sentences]

    monkeypatch.setattr("vega_policy.priors.wan._load_minilm", encoder)
    config, _, data = loaded
    prior = PriorConfig(
        name="wan_tiny_untrained", layer=0, clip="future", future_slots=1, prompt="instruction"
    )
    policy = VegaPolicy(replace_config(config.vega, prior=prior)).eval()
    dataset = replace(config.dataset, cache_root=str(tmp_path), cached=["prior", "frames"])
    part = replace(data.parts[0], config=dataset)
    cached, _ = make_source(replace(config, dataset=dataset), policy, replace(data, parts=[part]), None)
    batch = cached.batch(torch.tensor([3, 26, 11]))
    assert len(set(batch["task"])) == 2
    found = batch.pop("vega.prior")
    assert found.shape == (3, 2, 2 * 256, 2, 2)
    expected = policy.with_prior_features(batch)["vega.prior"]
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-2)

    def folder(**changed):
        policy.model.config = replace(policy.model.config, prior=replace(prior, **changed))
        return cache_streams(part, policy)[0].folder

    assert (tmp_path / folder()).is_dir()
    assert folder() == folder(slot_pool="attention") == folder(shuffle=True) == folder(engine="plain")
    assert len({folder(), folder(slot_pool="mean"), folder(prompt="empty"), folder(future_slots=2)}) == 4


def test_fields_of_futures_leave_the_caches_of_other_clips_as_they_are(loaded):
    _, policy, _ = loaded
    (stream,) = streams(policy, ["prior"])
    assert not {"future_slots", "slot_pool", "prompt", "shuffle"} & stream.key["prior"].keys()


def replace_config(config, **changed):
    fields = {"backbone": config.backbone, "prior": config.prior, "frame_size": config.frame_size} | changed
    made = tiny_policy(**fields)
    made.input_features, made.output_features = config.input_features, config.output_features
    return made


FROZEN, LEARNING = BackboneConfig(freeze_image_encoder=True), BackboneConfig()


@pytest.mark.parametrize(
    ("backbone", "prior", "wanted", "message"),
    [
        (LEARNING, PriorConfig(), ["semantic", "prior"], r"backbone\.freeze_image_encoder=false"),
        (FROZEN, PriorConfig(noise="fresh"), ["semantic", "prior"], r"prior\.noise=fresh"),
        (FROZEN, PriorConfig(clip="history"), ["semantic", "prior"], r"prior\.clip=history"),
        (LEARNING, PriorConfig(), ["prior"], r"leaves semantic to be computed.*Add 'frames'"),
    ],
    ids=["a learning encoder", "fresh noise", "a history of frames", "no frames for a live encoder"],
)
def test_streams_that_cannot_be_cached_are_refused(backbone, prior, wanted, message):
    with pytest.raises(ValueError, match=message):
        check_cacheable(backbone, prior, wanted)


def test_frames_are_cached_for_an_encoder_that_learns():
    assert check_cacheable(LEARNING, PriorConfig(), ["frames", "prior"]) == ["frames", "prior"]


def test_without_a_prior_its_stream_is_not_needed():
    assert check_cacheable(FROZEN, PriorConfig(name="none"), ["semantic", "prior"]) == ["semantic"]


def test_a_missing_dataset_names_the_command_that_collects_it(tmp_path):
    command = "python scripts/collect_demos.py env=lift_wide"
    config = tiny_run(tmp_path / "nowhere", tmp_path / "run", dataset={"collect_command": command})
    with pytest.raises(DatasetError, match=rf"No demonstrations in .*nowhere.*no such folder.*{command}"):
        load_data(config)
    assert not (tmp_path / "nowhere").exists()


def test_a_dataset_without_state_is_refused(tmp_path):
    root = write_dataset(tmp_path / "blind", state_width=0, lengths=(2,))
    with pytest.raises(DatasetError, match=r"expects: .*observation\.state.*has: observation\.images\.image"):
        load_data(tiny_run(root, tmp_path / "run"))


def test_a_dataset_without_the_expected_camera_names_both_lists(loaded):
    config, _, data = loaded
    policy = replace_config(config.vega)
    wrist = {"observation.images.wrist": config.vega.input_features[CAMERAS[0]]}
    policy.input_features = wrist | {"observation.state": config.vega.input_features["observation.state"]}
    with pytest.raises(DatasetError, match=r"expects: observation\.images\.wrist.*has: .*image .*image2"):
        match_features(policy, data.parts[0].dataset)


def test_nan_actions_are_refused_before_anything_is_written(tmp_path):
    root = write_dataset(tmp_path / "nan", nan_action_at=1, lengths=(3,))
    with pytest.raises(ValueError, match="finite numbers in action"):
        load_data(tiny_run(root, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert len(read_table(root)) == 3
