"""The error family: one class per thing that an operator does differently about it.

    NightrankError
    ├── InvalidConfig              the config cannot be run; fix the named field
    ├── DataRejected               the night's data cannot be used; the last good release stays
    │   ├── NightMissing           the partition is absent or holds no rows
    │   ├── NightChanged           files moved, grew or vanished while or after they were frozen
    │   ├── CorruptFile            a file is not readable Parquet, or is truncated
    │   ├── SchemaBroken           a column is absent, extra or of another type than the contract says
    │   ├── ExpectationsFailed     the night breaks its expectations or its quarantine limit
    │   └── NotEnoughHistory       too few clean nights before the one asked for
    ├── ValidatorBroken            an expectation raised or misjudged a canary: no verdict on the data
    ├── TrainingDiverged           the loss left the finite numbers
    ├── ParityBroken               the exported graph does not say what the network says
    ├── DeviceUnavailable          the config demands a device that this host lacks
    ├── PrefectUnavailable         there is no Prefect server, or the run has lost its own
    ├── StoreError                 something about the object store
    │   ├── StoreUnavailable       no answer, throttled or failing (transient)
    │   ├── StoreUnwritable        no permission, no space, read-only
    │   ├── ConditionsIgnored      the store does not honour conditional writes: not safe to publish to
    │   ├── ObjectMissing          a key that must exist does not
    │   ├── ObjectCorrupt          bytes do not match their digest, or are more than such an object has
    │   ├── FormatUnknown          an object is whole, but of a format of another version of nightrank
    │   ├── Conflict               a conditional write lost: the object changed under us
    │   └── OutcomeUnknown         a conditional write may or may not have happened (transient: the next try finds out)
    ├── SearchRunning              another search uses the file of trials
    ├── LeaseHeld                  another run of this pipeline is alive (transient)
    ├── LeaseLost                  our lease was taken over: stop writing
    ├── PointerMoved               the pointer names something newer than what this run may replace
    ├── ReleaseRefused             a reader refused a release; the old one keeps serving
    ├── NoRelease                  there is no champion to load
    └── RequestRejected            a ranking request does not fit the release's inputs

Every message names the object, the observed value, the limit and the remedy. ``transient`` answers the only
question a scheduler has: can a retry help?
"""


class NightrankError(Exception):
    """Root of the family.

    Attributes:
        transient: whether trying the same thing again can succeed without anybody changing anything.
    """

    transient: bool = False


class InvalidConfig(NightrankError):
    """The config cannot be run as it stands."""


class DataRejected(NightrankError):
    """A night's data cannot be used."""


class NightMissing(DataRejected):
    """The night's partition is absent or holds no rows."""


class NightChanged(DataRejected):
    """The night's files are not the ones that were frozen."""


class CorruptFile(DataRejected):
    """A file of the night cannot be read as Parquet."""


class SchemaBroken(DataRejected):
    """A file's columns or types differ from the contract."""


class ExpectationsFailed(DataRejected):
    """The night breaks its expectations, or too many of its rows had to be quarantined."""


class NotEnoughHistory(DataRejected):
    """There are too few clean nights before the one asked for."""


class ValidatorBroken(NightrankError):
    """An expectation raised, or misjudged a canary batch: there is no verdict on the data."""


class TrainingDiverged(NightrankError):
    """The training loss left the finite numbers."""


class ParityBroken(NightrankError):
    """The exported graph and the network disagree by more than the tolerance."""


class DeviceUnavailable(NightrankError):
    """The config demands a device that this host does not have."""


class PrefectUnavailable(NightrankError):
    """There is no Prefect server to run a flow with."""


class StoreError(NightrankError):
    """Something about the object store."""


class StoreUnavailable(StoreError):
    """The store gave no answer, throttled the call or failed."""

    transient = True


class StoreUnwritable(StoreError):
    """The store refuses writes: no permission, no space, or read-only."""


class ConditionsIgnored(StoreError):
    """The store does not honour conditional writes, so publishing to it would not be safe."""


class ObjectMissing(StoreError):
    """A key that must exist does not."""


class ObjectCorrupt(StoreError):
    """Stored bytes do not match their digest, or are more than such an object can have."""


class FormatUnknown(StoreError):
    """An object is whole, but of a format that this version of nightrank does not read."""


class Conflict(StoreError):
    """A conditional write lost: the object is not the one it was conditioned on."""


class OutcomeUnknown(StoreError):
    """A conditional write may or may not have happened, and the store cannot be asked.

    The same again reads what is there first, and takes a finished write for what it is.
    """

    transient = True


class SearchRunning(NightrankError):
    """Another search uses the file of trials."""


class LeaseHeld(NightrankError):
    """Another run of this pipeline is alive."""

    transient = True


class LeaseLost(NightrankError):
    """Another run took the lease over; this one must not write any more."""


class PointerMoved(NightrankError):
    """The pointer names something that this run may not replace."""


class ReleaseRefused(NightrankError):
    """A reader refused a release; the one it had keeps serving."""


class NoRelease(NightrankError):
    """The pipeline has no champion to load."""


class RequestRejected(NightrankError):
    """A ranking request does not fit the release's inputs."""
