"""What a drop layer computes on a set of rows, as torch operators; see `ops` and `reference`.

The Triton files must not be named after these functions: importing a submodule sets its name here.
"""

from lora_drop_vllm.kernels.ops import (
    compact_slots,
    drop_run,
    drop_run_back,
    save_changes,
    save_stream,
)

__all__ = ["compact_slots", "drop_run", "drop_run_back", "save_changes", "save_stream"]
