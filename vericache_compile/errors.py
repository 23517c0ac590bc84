"""Errors that say what was found, where, and what to do."""


class VericacheError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, found: str, where: str, fix: str) -> None:
        self.found, self.where, self.fix = found, where, fix
        super().__init__(f"{found}\n  where: {where}\n  fix: {fix}")

    @property
    def parts(self) -> dict[str, str]:
        """As `--json` prints them."""
        return {"found": self.found, "where": self.where, "fix": self.fix}


class OptionError(VericacheError, ValueError):
    """An option is unknown or out of range."""


class UnsupportedGraph(VericacheError):
    """A captured graph cannot be split into draft and verify; it runs under Inductor unchanged."""


class GhostError(VericacheError, RuntimeError):
    """A cache tensor holds no data and names no sequence that is still held."""


class PageLost(VericacheError, RuntimeError):
    """A part of full KV that was written to a file does not come back as it was."""


class TransferError(VericacheError, RuntimeError):
    """Full KV could not be brought to the device."""


class DemoModelError(VericacheError, RuntimeError):
    """The demo weights could not be fetched or converted."""
