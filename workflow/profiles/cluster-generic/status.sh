#!/bin/sh
# State of job $1, as Snakemake takes it. A scheduler that does not answer says nothing about the job.
state=$(squeue --noheader --states=all --format=%T --jobs="$1" 2>/dev/null) || state=UNKNOWN
case $state in
    COMPLETED) echo success ;;
    BOOT_FAIL | CANCELLED | DEADLINE | FAILED | NODE_FAIL | OUT_OF_MEMORY | PREEMPTED | TIMEOUT) echo failed ;;
    *) echo running ;;
esac
