"""How much may one visitor ask of the demo? Numbers; other modules hold visitors to them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is accepted; each is an option of `vlm demo`, whose name the errors use."""

    max_file_mb: int = 100
    max_megapixels: int = 40
    max_pictures: int = 16  # and videos, of one conversation
    max_video_seconds: int = 600
    max_waiting: int = 8  # questions in the queue, of all visitors
    max_requests: int = 120  # uploads and questions a minute, of one visitor
    max_requests_address: int = 1200  # the same, of all visitors from one address
    max_visitors: int = 200  # conversations that are held in memory
    max_disk_mb: int = 2000  # of uploads, pictures and videos of all visitors
    max_question: int = 8000  # characters, of a system prompt too

    def __post_init__(self) -> None:
        from vlm.errors import UserError  # heavy, and `vlm demo --help` reads this file

        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    @property
    def max_pixels(self) -> int:
        """The largest width * height."""
        return self.max_megapixels * 1_000_000

    @property
    def max_upload_bytes(self) -> int:
        """The largest request: several files at once, and what stands around them."""
        return 4 * self.max_file_bytes

    @property
    def max_file_bytes(self) -> int:
        """The largest upload."""
        return self.max_file_mb * 1_000_000
