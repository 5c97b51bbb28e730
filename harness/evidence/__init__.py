"""Numbers: records, statistics, run folders, provenance and tracking. No torch, and nothing of the engine."""

from harness.evidence.records import Record, RecordError
from harness.evidence.store import RunLocked, RunStore, StoredRun, StoreError, fingerprint, load_runs, sources_hash
from harness.evidence.summary import build_summary, last_line

__all__ = [
    "Record",
    "RecordError",
    "RunLocked",
    "RunStore",
    "StoreError",
    "StoredRun",
    "build_summary",
    "fingerprint",
    "last_line",
    "load_runs",
    "sources_hash",
]
