"""The ServerApp of a coordinator under Flower's own runtime: the run that came in a bundle, over a sealed SuperLink.

Flower forgets a run whose process ended. What must last lies in the coordinator's kit, in a folder for each run: the
same bundle started again goes on after the last checkpoint, and one whose run has ended starts nothing.
"""

from __future__ import annotations

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.flower_runtime import kit_folder, read_settings
from common.kit import load_kit
from server.flower_run import carry_out, read_order

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run of this bundle."""
    torch.set_num_threads(1)  # what is measured must not depend on how many cores there are
    kit = load_kit(kit_folder(context.node_config), role="coordinator")
    text, authorization = read_settings(context.run_config)
    carry_out(read_order(kit, text=text, authorization=authorization), kit, grid, context)
