"""Does it pay to keep a frozen encoder's features on disk? Arithmetic on counts, FLOPs and bytes.

The features of a picture cost one pass through the encoder, whenever they are stored. What is
saved is every reading beyond that, as a share of all FLOPs. Decoding is saved too; it is not
counted, because loader workers hide it where there are enough of them.
"""

from dataclasses import dataclass
from typing import Any, Literal

from vlm.errors import UserError

# A cache of a stage's features is often larger than its pictures; below this it is not worth it.
LEAST_SAVED = 0.15
# Checkpoints and logs need room, too.
SHARE_OF_FREE_SPACE = 0.8


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Where the features of frozen encoders are kept, and when.

    Attributes:
        folder: any number of runs may share it; null: nowhere.
        mode: "auto" uses it in stages where it pays, "always" in all whose encoder is frozen.
        max_gb: most that the folder may hold, in 10^9 bytes; where it would hold more, the stage
            says so and computes its features instead.
        runs: how many runs with this encoder and these pictures will read the folder.
    """

    folder: str | None = None
    mode: Literal["auto", "always"] = "auto"
    max_gb: float = 50.0
    runs: int = 1

    def __post_init__(self) -> None:
        if self.max_gb <= 0:
            raise UserError(f"feature_cache: max_gb must be above 0, not {self.max_gb}")
        if self.runs < 1:
            raise UserError(f"feature_cache: runs must be 1 or more, not {self.runs}")


@dataclass(frozen=True)
class Demand:
    """What a stage asks of its encoder.

    Attributes:
        readings: how often it looks at a picture.
        pictures: how many pictures it looks at.
        missing: how many of these are not stored.
        later: how often later stages of the run, their encoder frozen too, look at these again.
        encoder_flops: of encoding at every reading.
        other_flops: of all else the stage computes.
        picture_bytes: what the features of one picture take.
    """

    readings: int
    pictures: int
    missing: int
    later: int
    encoder_flops: float
    other_flops: float
    picture_bytes: float


@dataclass(frozen=True)
class Room:
    """Bytes: what the folder holds, and what the disk has left."""

    used: int
    free: int


@dataclass(frozen=True)
class Decision:
    """Whether features are stored and read, why, and from which numbers."""

    use: bool
    why: str
    numbers: dict[str, Any]


def saved_share(demand: Demand, runs: int) -> float:
    """Return the share of FLOPs that stored features save, over so many equal runs.

    Later stages are taken to spend as much beside each reading as this one.
    """
    computed = demand.missing / max(1, (demand.readings + demand.later) * runs)
    return encoder_share(demand) * (1 - min(1.0, computed))


def encoder_share(demand: Demand) -> float:
    """Return the encoder's share of the stage's FLOPs."""
    return demand.encoder_flops / max(1.0, demand.encoder_flops + demand.other_flops)


def budget(settings: FeatureCache, room: Room) -> int:
    """Return how many bytes may be added."""
    allowed = int(settings.max_gb * 1e9) - room.used
    return max(0, min(allowed, int(SHARE_OF_FREE_SPACE * room.free)))


def decide(settings: FeatureCache, demand: Demand, room: Room) -> Decision:
    """Return whether a stage with a frozen encoder stores and reads features."""
    saved, allowed = saved_share(demand, settings.runs), budget(settings, room)
    needed = int(demand.missing * demand.picture_bytes)
    numbers = {
        "readings": demand.readings,
        "pictures": demand.pictures,
        "stored": demand.pictures - demand.missing,
        "later_readings": demand.later,
        "encoder_share": round(encoder_share(demand), 4),
        "saved_share": round(saved, 4),
        "bytes_to_write": needed,
        "bytes_allowed": allowed,
    }
    later = f" and {demand.later} in later stages" if demand.later else ""
    why = (
        f"saves {saved:.1%} of the FLOPs: {demand.readings} readings{later} of "
        f"{demand.pictures} pictures, {demand.pictures - demand.missing} of them stored, encoder "
        f"{encoder_share(demand):.1%} of the FLOPs, {needed / 1e9:.3g} GB to write"
    )
    if not demand.pictures:
        return Decision(False, "the stage shows no pictures", numbers)
    if settings.mode == "auto" and saved < LEAST_SAVED:
        return Decision(False, f"{why}; worth it from {LEAST_SAVED:.0%} on", numbers)
    if needed > allowed:
        limit = f"max_gb {settings.max_gb:g} and the disk leave {allowed / 1e9:.3g} GB"
        return Decision(False, f"{why}, but {limit}", numbers)
    return Decision(True, why, numbers)
