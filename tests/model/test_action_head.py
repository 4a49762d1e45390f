import pytest
import torch
from lerobot.policies.common.flow_matching import euler_integrate

from tests.policies import batch, tiny_config
from vega_policy.model.action_head import euler, make_action_head
from vega_policy.model.config import ActionHeadConfig
from vega_policy.modeling_vega import VegaPolicy


def head(**config):
    torch.manual_seed(0)
    made = make_action_head(
        ActionHeadConfig(**{"width": 32, "depth": 2, "heads": 2, "steps": 4} | config), 24, 5, 3
    )
    for block in made.blocks:  # away from adaLN-zero's identity, so that every input can matter
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
        torch.nn.init.normal_(block.modulation.bias, std=0.1)
    return made


def context(batch=2):
    return torch.randn(batch, 7, 24), torch.ones(batch, 7, dtype=torch.bool)


@torch.no_grad()
def test_the_same_noise_gives_the_same_chunk():
    made, seen, noise = head(), context(), torch.randn(2, 5, 3)
    assert torch.equal(made.sample(*seen, noise, euler), made.sample(*seen, noise, euler))
    assert not torch.equal(made.sample(*seen, noise, euler), made.sample(*seen, -noise, euler))


@torch.no_grad()
@pytest.mark.parametrize("integrate", [euler, euler_integrate])
def test_modulations_and_keys_computed_once_give_the_chunk_of_recomputed_ones(integrate):
    made, seen, noise, rows = head(steps=10), context(), torch.randn(4, 5, 3), []
    made.blocks[0].modulation.register_forward_hook(lambda _, times, __: rows.append(len(times[0])))
    found = made.sample(*seen, noise, integrate)
    assert rows == [10]
    repeated, mask = (part.repeat_interleave(2, dim=0) for part in (made.norm_context(seen[0]), seen[1]))
    expected = integrate(lambda x, time: made.velocity(repeated, mask, x, time), noise, 10)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert rows == [10] + 10 * [4]


@torch.no_grad()
def test_an_integrator_of_other_times_gets_their_velocity():
    made, seen, noise = head(), context(), torch.randn(2, 5, 3)

    def once(velocity, x, steps):
        return velocity(x, torch.tensor([0.123, 0.456]))

    expected = made.velocity(made.norm_context(seen[0]), seen[1], noise, torch.tensor([0.123, 0.456]))
    torch.testing.assert_close(made.sample(*seen, noise, once), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_chunk_depends_on_the_context_but_not_on_what_is_masked():
    made, (seen, mask), noise = head(), context(), torch.randn(2, 5, 3)
    base = made.sample(seen, mask, noise, euler)
    assert not torch.allclose(base, made.sample(seen.flip(0), mask, noise, euler), atol=1e-5)
    mask[:, -1] = False
    masked = made.sample(seen, mask, noise, euler)
    seen[:, -1] = 100
    torch.testing.assert_close(masked, made.sample(seen, mask, noise, euler))


def test_the_loss_is_a_function_of_noise_and_time_and_leaves_padding_out():
    made, seen, actions = head(), context(), torch.randn(2, 5, 3)
    is_pad = torch.zeros(2, 5, dtype=torch.bool)
    is_pad[0, 3:] = True

    noise, time = made.sample_noise_and_time(actions)

    def loss(values):
        return made.loss(*seen, values, is_pad, noise, time)

    assert torch.equal(loss(actions), loss(actions))
    with pytest.raises(ValueError, match="needs noise"):
        made.loss(*seen, actions, is_pad)
    torch.nn.init.zeros_(
        made.output[1].weight
    )  # a constant prediction: the loss is that of its targets alone
    padded, seen_step = actions.clone(), actions.clone()
    padded[0, 3:] += 5
    seen_step[0, 2] += 5
    assert torch.equal(loss(padded), loss(actions))
    assert loss(seen_step)[0] != loss(actions)[0]
    assert loss(seen_step)[1] == loss(actions)[1]


def test_a_few_steps_of_training_learn_to_tell_two_contexts_apart():
    made, (seen, mask) = head(steps=10), context()
    actions = torch.stack([torch.ones(5, 3), -torch.ones(5, 3)])
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    repeated = (seen.repeat(16, 1, 1), mask.repeat(16, 1))
    for _ in range(120):
        optimizer.zero_grad()
        targets = actions.repeat(16, 1, 1)
        noise, time = made.sample_noise_and_time(targets, generator)
        made.loss(*repeated, targets, None, noise, time).mean().backward()
        optimizer.step()
    with torch.no_grad():
        sampled = made.sample(seen, mask, torch.randn(2, 5, 3, generator=generator), euler)
    assert sampled[0].mean() > 0.5
    assert sampled[1].mean() < -0.5


def test_processes_sample_the_noise_that_one_process_samples_for_all():
    made, actions = head(), torch.zeros(4, 5, 3)
    whole = made.sample_noise_and_time(actions, torch.Generator().manual_seed(7))
    for rank in range(2):
        part = made.sample_noise_and_time(actions[:2], torch.Generator().manual_seed(7), rank, 2)
        for sampled, expected in zip(part, whole, strict=True):
            assert torch.equal(sampled, expected[2 * rank : 2 * rank + 2])


def regression(**config):
    torch.manual_seed(0)
    return make_action_head(
        ActionHeadConfig(**{"name": "l1", "width": 32, "depth": 2, "heads": 2} | config), 24, 5, 3
    )


@torch.no_grad()
def test_l1_regression_needs_no_noise_and_reads_what_is_not_masked():
    made, (seen, mask) = regression(), context()
    base = made.sample(seen, mask, torch.randn(2, 5, 3), euler)
    assert torch.equal(base, made.sample(seen, mask, torch.randn(2, 5, 3), euler))
    assert not torch.allclose(base, made.sample(seen.flip(0), mask, torch.zeros(2, 5, 3), euler), atol=1e-5)
    assert made.sample(seen, mask, torch.zeros(6, 5, 3), euler).shape == (6, 5, 3)
    mask[:, -1] = False
    masked = made.sample(seen, mask, torch.zeros(2, 5, 3), euler)
    seen[:, -1] = 100
    torch.testing.assert_close(masked, made.sample(seen, mask, torch.zeros(2, 5, 3), euler))


def test_the_l1_loss_is_the_mean_absolute_error_of_the_steps_that_exist():
    made, (seen, mask), actions = regression(), context(), torch.randn(2, 5, 3)
    is_pad = torch.zeros(2, 5, dtype=torch.bool)
    is_pad[0, 3:] = True
    error = (made.predict(seen, mask) - actions).abs()
    expected = torch.stack([error[0, :3].mean(), error[1].mean()])
    torch.testing.assert_close(made.loss(seen, mask, actions, is_pad), expected)
    torch.testing.assert_close(made.loss(seen, mask, actions), error.mean(dim=(1, 2)))


def test_l1_regression_learns_to_tell_two_contexts_apart():
    made, (seen, mask) = regression(), context()
    actions = torch.stack([torch.ones(5, 3), -torch.ones(5, 3)])
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        made.loss(seen, mask, actions).mean().backward()
        optimizer.step()
    assert made.loss(seen, mask, actions).mean() < 0.3


def test_l1_regression_trains_a_policy_and_the_state_can_be_kept_from_it():
    for state in (True, False):
        torch.manual_seed(0)
        config = tiny_config()
        config.head = ActionHeadConfig(name="l1", width=32, depth=1, heads=2, state=state)
        policy = VegaPolicy(config)
        loss, _ = policy(batch())
        loss.backward()
        assert policy.model.head.queries.grad.abs().max() > 0
        seen = batch()
        chunk = policy.eval().predict_action_chunk(seen)
        moved = policy.predict_action_chunk(seen | {"observation.state": seen["observation.state"] + 1})
        assert torch.equal(chunk, moved) != state


def test_an_unknown_expert_and_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"Unknown head 'flw'. Did you mean 'flow'\? Known: flow"):
        head(name="flw")
    with pytest.raises(ValueError, match=r"head.steps: expected at least 1; got 0"):
        ActionHeadConfig(steps=0)


MAKERS = pytest.mark.parametrize("make", [head, regression])


@MAKERS
def test_without_a_prefix_nothing_is_sampled_or_added(make):
    plain, trained = make(), make(prefix_steps=3)
    actions = torch.zeros(4, 5, 3)
    _, time = plain.sample_noise_and_time(actions)
    assert time is None or time.shape == (4,)
    assert {name for name, _ in trained.named_parameters()} - {
        "embed_prefix.weight",
        "embed_prefix.bias",
    } == {name for name, _ in plain.named_parameters()}


@MAKERS
def test_prefixes_of_all_lengths_are_sampled_and_a_part_of_the_samples_has_none(make):
    made, actions = make(prefix_steps=3, prefix_dropout=0.5), torch.zeros(4000, 5, 3)
    _, time = made.sample_noise_and_time(actions, torch.Generator().manual_seed(0))
    lengths = (time == 0).sum(dim=1)
    assert torch.equal(time == 0, torch.arange(5) < lengths[:, None])  # at the chunk's start
    shares = torch.bincount(lengths, minlength=5) / len(lengths)
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.125, 0.125, 0.125, 0.0]), atol=0.03, rtol=0)
    for rank in range(2):
        part = made.sample_noise_and_time(actions[:2000], torch.Generator().manual_seed(0), rank, 2)[1]
        assert torch.equal(part, time[2000 * rank : 2000 * rank + 2000])


@MAKERS
def test_the_loss_leaves_the_prefix_out(make):
    made, seen, actions = make(prefix_steps=3), context(), torch.randn(2, 5, 3)
    noise, time = torch.randn(2, 5, 3), torch.full((2, 5), 0.5)
    time[:, :2] = 0.0
    torch.nn.init.zeros_(made.output[-1].weight)  # a constant prediction
    moved = actions.clone()
    moved[:, :2] += 5

    def loss(values, is_pad=None):
        return made.loss(*seen, values, is_pad, noise, time)

    assert torch.equal(loss(moved), loss(actions))
    moved[:, 4] += 5
    assert not torch.equal(loss(moved), loss(actions))
    is_pad = torch.arange(5).expand(2, 5) == 4
    assert torch.equal(loss(moved, is_pad), loss(actions, is_pad))


@MAKERS
def test_a_prefix_of_other_actions_is_what_the_head_is_given_and_the_targets_stay(make):
    made, seen = make(prefix_steps=3), context()
    actions, executed, noise = torch.randn(3, 2, 5, 3).unbind()
    time = torch.rand(2, 5)
    time[0, :2], time[1, :0] = 0.0, 0.0  # the second sample has no prefix
    for weight in made.parameters():  # away from adaLN-zero's identity
        weight.data += 0.1 * torch.randn_like(weight)

    def loss(values, prefix=None):
        return made.loss(*seen, values, None, noise, time, None, prefix)

    mixed = torch.where((time == 0)[..., None], executed, actions)
    assert torch.equal(loss(actions, executed), loss(mixed))  # the loss leaves the prefix out
    assert torch.equal(
        loss(actions, mixed), loss(actions, executed)
    )  # after it nothing of `executed` is read
    assert torch.equal(loss(actions, actions), loss(actions))
    differs = loss(actions, executed) != loss(actions)
    assert differs.tolist() == [True, False]


@MAKERS
def test_a_chunk_begins_with_its_prefix_and_continues_it(make):
    made, (seen, mask) = make(prefix_steps=3), context()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    repeated = (seen.repeat(16, 1, 1), mask.repeat(16, 1))
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(16)[:, None, None]
    targets = signs * torch.ones(32, 5, 3)  # either way in the same context: only the prefix decides
    for _ in range(80):
        optimizer.zero_grad()
        noise, time = made.sample_noise_and_time(targets, generator)
        made.loss(*repeated, targets, None, noise, time).mean().backward()
        optimizer.step()
    noise = torch.randn(2, 5, 3, generator=generator)
    for sign in (1.0, -1.0):
        prefix = sign * torch.ones(2, 2, 3)
        with torch.no_grad():
            chunk = made.sample(seen, mask, noise, prefix=prefix)
        assert torch.equal(chunk[:, :2], prefix)
        assert (sign * chunk[:, 2:]).mean() > 0.5
