"""Lightning's Trainer. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
import torch
from small import STEPS, arguments, data, kill_if_due, model, report
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import tierkeep.lightning  # +


class Small(pl.LightningModule):
    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self.net = model()
        self.kill_at = kill_at

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        rows, classes = batch
        loss = nn.functional.cross_entropy(self.net(rows), classes)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # Nothing below is needed outside of this example.

    def on_train_start(self) -> None:
        print("starts at step", self.global_step)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        kill_if_due(self.global_step, self.kill_at)


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(3)
    small = Small(args.kill_at)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=STEPS // 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[tierkeep.lightning.CheckpointCallback(args.run, every=3)],  # +
    )
    trainer.fit(small, StatefulDataLoader(data(), batch_size=8, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss'].item():.4f}")
    report(small.parameters())


if __name__ == "__main__":
    main()
