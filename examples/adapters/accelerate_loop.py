"""A loop on Hugging Face Accelerate. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from small import STEPS, arguments, data, kill_if_due, model, report
from torch import nn

import tierkeep.accelerate  # +


def main() -> None:
    args = arguments()
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(
            use_stateful_dataloader=True,  # +
            use_seedable_sampler=True,  # +
        ),
    )
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader = torch.utils.data.DataLoader(data(), batch_size=8, shuffle=True)
    net, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, scheduler, loader)
    with tierkeep.accelerate.Keeper(accelerator, args.run, every=3) as keeper:  # +
        found = keeper.restore()  # +
        start = found.step if found else 0  # +
        print("starts at step", start)
        for step, (rows, classes) in enumerate(loader, start + 1):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(rows), classes)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            keeper.step(step)  # +
            kill_if_due(step, args.kill_at)
    print(f"loss {loss.item():.4f}")
    report(net.parameters())


if __name__ == "__main__":
    main()
