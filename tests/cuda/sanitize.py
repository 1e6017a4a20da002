"""Every op that has a CUDA kernel, for compute-sanitizer to watch: no result is checked."""

from __future__ import annotations

import calls
import torch


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    for part in calls.PARTS:
        for _ in part():
            pass
        torch.cuda.synchronize()
        print(part.__name__, flush=True)


if __name__ == "__main__":
    main()
