"""The Trainer of Hugging Face transformers. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from small import arguments, data, kill_if_due, model, report
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import tierkeep.transformers  # +


class Classifier(nn.Module):
    """The Trainer calls a model with the columns of its data, and gets the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.net(rows)
        return nn.functional.cross_entropy(found, labels), found


def columns(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    rows, labels = zip(*batch, strict=True)
    return {"rows": torch.stack(rows), "labels": torch.stack(labels)}


class Ends(TrainerCallback):
    """Says where the training begins, and kills it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        print("starts at step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        kill_if_due(state.global_step, self.at)


def main() -> None:
    args = arguments()
    keeper = tierkeep.transformers.CheckpointCallback(args.run, every=3)  # +
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=Classifier(),
            args=TrainingArguments(
                output_dir=output,
                num_train_epochs=2,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                logging_steps=4,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=data(),
            data_collator=columns,
            callbacks=[
                Ends(args.kill_at),
                keeper,  # +
            ],
        )
        trainer.train(
            resume_from_checkpoint=keeper.newest(trainer),  # +
        )
    [*_, last] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print("loss", last)
    report(trainer.model.parameters())


if __name__ == "__main__":
    main()
