"""What a recording asks of a demonstration besides its task."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemonstrationOptions:
    """Options of `demonstrate`; the defaults give a plain recording to the end of the task.

    Attributes:
        noise_correlation: of the action noise between two control steps, in [0, 1).
        start_spread: largest shift of the hand's start in x, y (both ways) and upwards z (m).
        follow_through: go on until the hand has let go and retreated; False ends at the first success.
    """

    noise_correlation: float = 0.9
    start_spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    follow_through: bool = True

    def __post_init__(self) -> None:
        """Refuses a start spread that is negative or larger than the arm can follow from its rest pose.

        Raises:
            ValueError: a spread outside [0, 0.3] m.
        """
        if not all(0.0 <= spread <= 0.3 for spread in self.start_spread):
            raise ValueError(
                f"start_spread is a distance per axis: expected [0, 0.3] m, got {self.start_spread}"
            )
