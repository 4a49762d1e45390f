import pytest
import torch

from vega_policy.model.action_head import euler, interpolate, masked_mean_square, sample_time, velocity


def test_the_path_starts_at_the_actions_and_ends_at_the_noise():
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(interpolate(actions, noise, torch.zeros(2)), actions)
    assert torch.equal(interpolate(actions, noise, torch.ones(2)), noise)


def test_the_velocity_is_the_derivative_of_the_path_by_time():
    actions, noise = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    time = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def path(t):
        return interpolate(actions, noise, t)

    _, derivative = torch.func.jvp(path, (time,), (torch.ones_like(time),))
    torch.testing.assert_close(derivative, velocity(actions, noise))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_on_the_true_velocity_arrives_at_the_actions(steps):
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    arrived = euler(lambda x, time: velocity(actions, noise), noise, steps)
    torch.testing.assert_close(arrived, actions)


def test_euler_visits_the_times_of_lerobot():
    times = []
    euler(lambda x, time: times.append(time[0].item()) or x, torch.zeros(1, 1, 1), 4)
    assert times == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_training_times_follow_the_beta_distribution():
    time = sample_time(200_000, 1.5, torch.Generator().manual_seed(0))
    assert time.min() >= 0.001
    assert time.max() <= 1
    assert time.mean().item() == pytest.approx(0.001 + 0.999 * 1.5 / 2.5, abs=2e-3)


def test_padded_steps_do_not_count():
    error = torch.ones(2, 4, 3)
    error[:, 2:] = 100
    is_pad = torch.tensor([[False, False, True, True], [True] * 4])
    assert masked_mean_square(error, is_pad).tolist() == [1.0, 0.0]
    assert masked_mean_square(torch.ones(2, 4, 3), None).tolist() == [1.0, 1.0]
