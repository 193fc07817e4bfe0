"""A training loop of one's own. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

import torch
from small import STEPS, arguments, data, kill_if_due, model, report
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import tierkeep  # +
import tierkeep.torch  # +


def main() -> None:
    args = arguments()
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader = StatefulDataLoader(data(), batch_size=8, shuffle=True)
    state = tierkeep.torch.training_state(  # +
        net,
        optimizer,
        scheduler=scheduler,
        loader=loader,  # +
    )  # +
    with tierkeep.Checkpointer(args.run, every=3) as ckpt:  # +
        found = ckpt.restore(state)  # +
        start = found.step if found else 0  # +
        print("starts at step", start)
        for step, (rows, classes) in enumerate(loader, start + 1):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(rows), classes)
            loss.backward()
            optimizer.step()
            scheduler.step()
            ckpt.step(step, state)  # +
            kill_if_due(step, args.kill_at)
    print(f"loss {loss.item():.4f}")
    report(net.parameters())


if __name__ == "__main__":
    main()
