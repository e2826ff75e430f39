"""What is written of a run: its schema, its file, and the times it tells. Pure Python."""

from mpisync.records.files import RecordReader, RecordWriter, read_record
from mpisync.records.schema import ArrivalRecord, RunEnd, RunHeader, StepRecord

__all__ = [
    "ArrivalRecord",
    "RecordReader",
    "RecordWriter",
    "RunEnd",
    "RunHeader",
    "StepRecord",
    "read_record",
]
