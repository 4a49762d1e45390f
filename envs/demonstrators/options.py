"""What a recording asks of a demonstration besides its task."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemonstrationOptions:
    """Options of `demonstrate`; the defaults give a plain recording to the end of the task.

    Attributes:
        noise_correlation: of the action noise between two control steps, in [0, 1).
        start_spread: largest shift of the hand's start in x, y (both ways) and upwards z (m).
        detour: largest error of the first approach, in metres of x and y and in radians of yaw. The hand
            first goes to a wrong place above the object, then corrects itself: recordings show corrections
            while every action stays the demonstrator's own. Lift and LiftWide only; others refuse it.
        missed_share: share of the episodes, in [0, 1], that begin as if a grasp had just missed: the hand
            closed, empty, 4 to 14 cm above the object's centre, up to 4 cm aside in x and in y, turned by
            up to 0.6 rad. Recordings then show how to try again, and no miss itself; `start_spread` does not
            apply to them. Lift and LiftWide only; others refuse it.
        follow_through: go on until the hand has let go and retreated; False ends at the first success.
    """

    noise_correlation: float = 0.9
    start_spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    detour: tuple[float, float] = (0.0, 0.0)
    missed_share: float = 0.0
    follow_through: bool = True

    def __post_init__(self) -> None:
        """Refuses what is negative or more than the arm can follow.

        Raises:
            ValueError: a spread outside [0, 0.3] m, a detour outside [0, 0.1] m or [0, 1] rad, or a share
                outside [0, 1].
        """
        share = self.missed_share
        if not (isinstance(share, int | float) and not isinstance(share, bool) and 0.0 <= share <= 1.0):
            raise ValueError(
                f"missed_share is a share of the episodes: expected a number in [0, 1], got {share!r}"
            )
        if not (0.0 <= self.detour[0] <= 0.1 and 0.0 <= self.detour[1] <= 1.0):
            raise ValueError(f"detour: expected up to 0.1 m and up to 1 rad, got {self.detour}")
        if not all(0.0 <= spread <= 0.3 for spread in self.start_spread):
            raise ValueError(
                f"start_spread is a distance per axis: expected [0, 0.3] m, got {self.start_spread}"
            )
