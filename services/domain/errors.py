"""Every error that crosses a border of this system, and the one table that says how it looks outside.

    LikenessError
    ├── InvalidSpec            the caller's input is wrong; lists all faults
    │   ├── BadInput           input whose fault shows only at run time (a download, an archive, a model)
    │   └── EgressRefused      an address that users named and that this service does not go to
    ├── Unauthenticated        no key, or an unknown one
    ├── PermissionDenied       a key without the right to this
    ├── NotFound               absent, expired, or somebody else's
    ├── AlreadyExists          create-only, and it is there
    ├── WrongState             the job's state does not allow this
    │   └── StaleEpoch         a report from a worker that no longer owns the job
    ├── QueueFull              no room for one more job
    ├── RateLimited            too many requests in the window
    ├── OutOfDeviceMemory      the device is too small for this plan
    ├── Diverged               the loss or the weights stopped being finite
    ├── ExportMismatch         a trained model, read back from its files, is not what was trained
    ├── Conflict               another write came first: read again, decide again
    ├── Unavailable            the bus, the store or a sibling service does not answer; try again
    │   ├── OutcomeUnknown     a write that may or may not have been stored
    │   └── AlteredBytes       storage sent other bytes than it was asked for
    ├── DeadlineExceeded       the time allowed has passed
    ├── Cancelled              the caller or the owner ended it
    └── Internal               a bug; the text says nothing, the log says all

Interceptors, dialects and workers look rows up with :func:`row_of`; they decide nothing themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of an input.

    Attributes:
        field: path of the field as the caller spelled it, for instance ``samples[0].num_outputs``.
        rule: the rule that is broken, as a sentence part: ``must be between 1 and 10``.
    """

    field: str
    rule: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule}" if self.field else self.rule


class LikenessError(Exception):
    """Base of all errors that may cross a border; its text is safe to show to the caller."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message


class InvalidSpec(LikenessError):
    """The input breaks rules; carries every violation found, not only the first."""

    def __init__(self, violations: Sequence[Violation] | str, field: str = "") -> None:
        if isinstance(violations, str):
            violations = [Violation(field, violations)]
        self.violations = tuple(violations)
        super().__init__("; ".join(str(violation) for violation in self.violations))


class BadInput(InvalidSpec):
    """Input that was well formed, and turned out unusable when it was read."""


class EgressRefused(InvalidSpec):
    """An address that users named and that this service does not connect to."""


class Unauthenticated(LikenessError):
    """No key, or one that is not known."""


class PermissionDenied(LikenessError):
    """A known key without the right to do this."""


class NotFound(LikenessError):
    """Absent, expired, or belonging to another project: the answer is the same."""


class AlreadyExists(LikenessError):
    """Something create-only is there already, and differs."""


class WrongState(LikenessError):
    """The job's present state does not allow the operation."""


class StaleEpoch(WrongState):
    """The report names an epoch that no longer owns the job; the worker must stop."""


class QueueFull(LikenessError):
    """The queue, or the job log behind it, has no room for one more job."""


class RateLimited(LikenessError):
    """The key has used up its requests for now."""


class OutOfDeviceMemory(LikenessError):
    """The plan does not fit into the device's memory; the text names a smaller one."""


class Diverged(LikenessError):
    """Loss or gradients stopped being finite and did not recover."""


class ExportMismatch(LikenessError):
    """What was written of a trained model is not what was trained, so that it is not published."""


class Conflict(LikenessError):
    """A compare-and-set lost against another write."""


class Unavailable(LikenessError):
    """The bus, the store or a sibling service cannot be reached at the moment."""


class OutcomeUnknown(Unavailable):
    """A write was sent, and nothing says whether it was stored."""


class AlteredBytes(Unavailable):
    """Storage sent other bytes than the digest promises."""


class DeadlineExceeded(LikenessError):
    """The time that was allowed has passed."""


class Cancelled(LikenessError):
    """Ended by its owner."""


class Internal(LikenessError):
    """A bug or an unforeseen fault; details belong to the log only."""


OUTAGES: tuple[type[LikenessError], ...] = (Unavailable, DeadlineExceeded, Cancelled)
"""What a call raises whose other side is away, frozen or leaving. It says nothing about the job it was made for."""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """How one class of errors looks at each border.

    Attributes:
        reason: stable UPPER_SNAKE name, in ``google.rpc.ErrorInfo`` and in ``job.error``.
        grpc_code: name of the gRPC status code.
        http_status: status that a dialect starts from.
        fails_job: a job that meets this error ends FAILED at once.
        retry_job: the job is given back and tried again while attempts are left.
    """

    reason: str
    grpc_code: str
    http_status: int
    fails_job: bool = False
    retry_job: bool = False


ERROR_TABLE: Mapping[type[LikenessError], ErrorRow] = MappingProxyType(
    {
        LikenessError: ErrorRow("INTERNAL", "INTERNAL", 500, retry_job=True),
        InvalidSpec: ErrorRow("INVALID_SPEC", "INVALID_ARGUMENT", 400, fails_job=True),
        BadInput: ErrorRow("BAD_INPUT", "INVALID_ARGUMENT", 400, fails_job=True),
        EgressRefused: ErrorRow("EGRESS_REFUSED", "INVALID_ARGUMENT", 400, fails_job=True),
        Unauthenticated: ErrorRow("UNAUTHENTICATED", "UNAUTHENTICATED", 401),
        PermissionDenied: ErrorRow("PERMISSION_DENIED", "PERMISSION_DENIED", 403),
        NotFound: ErrorRow("NOT_FOUND", "NOT_FOUND", 404, fails_job=True),
        AlreadyExists: ErrorRow("ALREADY_EXISTS", "ALREADY_EXISTS", 409, fails_job=True),
        WrongState: ErrorRow("WRONG_STATE", "FAILED_PRECONDITION", 400),
        StaleEpoch: ErrorRow("STALE_EPOCH", "FAILED_PRECONDITION", 400),
        QueueFull: ErrorRow("QUEUE_FULL", "RESOURCE_EXHAUSTED", 429),
        RateLimited: ErrorRow("RATE_LIMITED", "RESOURCE_EXHAUSTED", 429),
        OutOfDeviceMemory: ErrorRow("OUT_OF_DEVICE_MEMORY", "RESOURCE_EXHAUSTED", 500, fails_job=True),
        Diverged: ErrorRow("DIVERGED", "ABORTED", 500, fails_job=True),
        ExportMismatch: ErrorRow("EXPORT_MISMATCH", "INTERNAL", 500, retry_job=True),
        Conflict: ErrorRow("CONFLICT", "ABORTED", 409, retry_job=True),
        Unavailable: ErrorRow("UNAVAILABLE", "UNAVAILABLE", 503, retry_job=True),
        OutcomeUnknown: ErrorRow("OUTCOME_UNKNOWN", "UNAVAILABLE", 503, retry_job=True),
        AlteredBytes: ErrorRow("ALTERED_BYTES", "UNAVAILABLE", 503, retry_job=True),
        DeadlineExceeded: ErrorRow("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 504, fails_job=True),
        Cancelled: ErrorRow("CANCELLED", "CANCELLED", 499, fails_job=True),
        Internal: ErrorRow("INTERNAL", "INTERNAL", 500, retry_job=True),
    }
)

INTERNAL_TEXT = "internal error"
"""The only text that a caller sees of an error without a class of its own."""


def row_of(error: BaseException | type[BaseException]) -> ErrorRow:
    """Looks up the row of an error: the nearest class in its ancestry wins.

    Args:
        error: an exception, or a class of exceptions.

    Returns:
        The row; foreign exceptions get the row of :class:`Internal`.
    """
    kind = error if isinstance(error, type) else type(error)
    for ancestor in kind.__mro__:
        if issubclass(ancestor, LikenessError) and ancestor in ERROR_TABLE:
            return ERROR_TABLE[ancestor]
    return ERROR_TABLE[Internal]


def class_of(reason: str) -> type[LikenessError]:
    """Finds the error class with this reason, for the client's side of a border.

    Args:
        reason: the UPPER_SNAKE name from the wire.

    Returns:
        The class; :class:`Internal` for a reason this version does not know.
    """
    for kind, row in ERROR_TABLE.items():
        if row.reason == reason and kind is not LikenessError:
            return kind
    return Internal


def public_text(error: BaseException) -> str:
    """The sentence a caller may see: an error's own text, or :data:`INTERNAL_TEXT`."""
    known = isinstance(error, LikenessError) and row_of(error).reason != "INTERNAL"
    return str(error) if known else INTERNAL_TEXT
