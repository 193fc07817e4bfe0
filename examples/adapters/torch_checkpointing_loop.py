"""Meta's torch_checkpointing. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

import torch
from small import STEPS, arguments, data, kill_if_due, model, report
from torch import nn
from torch_checkpointing import CheckpointManager

import tierkeep.torch_checkpointing as tierkeep  # +


def main() -> None:
    args = arguments()
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    config = CheckpointManager.Config.with_sync_save()
    manager = CheckpointManager(tierkeep.configured(config))  # +
    start = 0
    newest = tierkeep.newest(args.run)  # +
    if newest:
        found = manager.load(newest, into=dict.fromkeys(("model", "optim", "rng", "step")))
        net.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optim"])
        torch.set_rng_state(found["rng"])
        start = found["step"]
    print("starts at step", start)
    rows, classes = data().tensors
    for step in range(start + 1, STEPS + 1):
        batch = slice(8 * (step - 1), 8 * step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(rows[batch]), classes[batch])
        loss.backward()
        optimizer.step()
        if step % 3 == 0:
            state = {"model": net.state_dict(), "optim": optimizer.state_dict(), "step": step}
            manager.save(f"{args.run}/step_{step}", {**state, "rng": torch.get_rng_state()})
        kill_if_due(step, args.kill_at)
    manager.close()
    print(f"loss {loss.item():.4f}")
    report(net.parameters())


if __name__ == "__main__":
    main()
