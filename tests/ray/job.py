"""A script of a user of Ray: answer a file of requests on two engines. Arguments: input, output, target, tree."""

import sys
from pathlib import Path

import ray

from mcsd.batch_files import BatchOptions
from mcsd.config import EngineOptions
from mcsd.ray import run_batch

if __name__ == "__main__":
    given, output, target, tree = sys.argv[1:]
    options = BatchOptions(Path(given), Path(output), EngineOptions(target=target, tree=tree))
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200e6, log_to_driver=False)
    try:
        print(run_batch(options, concurrency=2, batch_size=32))
    finally:
        ray.shutdown()
