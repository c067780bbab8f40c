"""Snakemake that asks for the state of its jobs every second. The plugin for Slurm waits ever longer."""

import asyncio
import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

RemoteExecutor.sleep = lambda executor: asyncio.sleep(1)

if __name__ == "__main__":
    sys.exit(main())
