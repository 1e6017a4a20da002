"""Every op that has a CUDA kernel, for compute-sanitizer to watch: no result is checked.

`python sanitize.py [PART]...`, parts of `calls.py`. It prints the name of each call that is done.
"""

from __future__ import annotations

import sys

import calls
import torch


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    by_name = {part.__name__: part for part in calls.PARTS}
    for part in [by_name[name] for name in names] or calls.PARTS:
        for call, _ in part():
            torch.cuda.synchronize()
            print(call, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
