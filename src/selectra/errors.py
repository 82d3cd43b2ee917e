"""The errors that Selectra raises on purpose; everything else is a bug."""


class ConfigError(ValueError):
    """A name, an option or a combination of options that does not exist or does not fit."""


class DataError(ValueError):
    """Input data that cannot be used as it is."""


class BackendError(RuntimeError):
    """A kernel was asked for that cannot take this call, or none can; the message is the reason."""


class RankError(RuntimeError):
    """Another process of a group ended, failed, or did not answer within the time limit."""
