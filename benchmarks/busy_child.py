"""An arm of `busy.py` in a process of its own: it takes the first step of a recipe, again and again, when it is told to.

Its lines: what it runs with, then the seconds and tokens of each step. The number of threads is that of the arm; `ours` is what
`deepgrpo train` does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> None:
    arm, changes = settings["arm"], dict(settings["changes"])
    if arm == "ours":
        from deepgrpo.threads import limit_spinning

        limit_spinning()
    import torch

    from deepgrpo.config import load_recipe, shipped
    from deepgrpo.train.loop import train_step
    from deepgrpo.train.setup import open_run
    from deepgrpo.train.warmstart import load_from

    if arm != "ours":
        changes["run.threads"] = "1" if arm == "one" else str(torch.get_num_threads())
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no line of ours
    with tempfile.TemporaryDirectory(prefix="deepgrpo-busy-") as folder:
        changes |= {"run.dir": folder, "eval.every": "none", "warmstart": "none", "log.trees_every": "none"}
        run = open_run(load_recipe(shipped.find_recipe(settings["recipe"]), list(changes.items())), None)
        if settings["start"]:
            load_from(run.policy, Path(settings["start"]))
        state = run.begin()
        start = {name: value.clone() for name, value in run.policy.trainable().items()}

        def say(**what: Any) -> None:
            print(json.dumps(what), file=out, flush=True)

        def step() -> tuple[float, int]:
            with torch.no_grad():
                for name, value in run.policy.trainable().items():
                    value.copy_(start[name])
            run.policy.version += 1  # the engine drops what it keeps of the weights before
            began = time.perf_counter()
            after, _ = train_step(run, state)
            return time.perf_counter() - began, after.ledger.sampled_tokens - state.ledger.sampled_tokens

        step()  # warms up
        say(threads=torch.get_num_threads(), parameters=sum(p.numel() for p in run.policy.model.parameters()))
        for _ in sys.stdin:
            taken, tokens = step()
            say(seconds=taken, tokens=tokens)
        run.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
