"""Train with the parts of Hugging Face's Trainer, and a loop of one's own: mpisync run -n 3 transformers_trainer.py."""

import os

import torch
from mpi4py import MPI

import mpisync

# accelerate takes these for torch.distributed's, and waits for a process group that nobody makes. After mpi4py's and
# mpisync's import, which read them; before TrainingArguments.
for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
    os.environ.pop(name, None)

from torch.utils.data import DataLoader  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

BATCH, STEPS = 16, 80

torch.manual_seed(0)
tokens = torch.randint(0, 32, (256, 8))
labels = (tokens[:, 0] < 16).long()
data = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]

config = BertConfig(
    vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
args = TrainingArguments(
    "output",
    use_cpu=True,
    per_device_eval_batch_size=64,
    learning_rate=3e-3,
    weight_decay=0.01,
    warmup_steps=10,
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(
    BertForSequenceClassification(config),
    args,
    train_dataset=data,
    eval_dataset=data,
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
)

# What trainer.train() would make of these; its loop is written below.
trainer.create_optimizer_and_scheduler(num_training_steps=STEPS)
loader = DataLoader(trainer.train_dataset, batch_size=BATCH, shuffle=True, collate_fn=trainer.data_collator)

trainer.model.train()
with mpisync.Session(
    MPI.COMM_WORLD,
    trainer.model,
    trainer.optimizer,
    scheduler=trainer.lr_scheduler,
    clip_norm=args.max_grad_norm,
    policy=mpisync.BackupWorkers(0),
    progress=False,
) as session:
    for inputs in session.batches(loader, steps=STEPS):
        with trainer.compute_loss_context_manager():  # autocast, where the arguments ask for it
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        session.step(loss)

if session.worker is None or session.workers == 1:  # the root, or who trains alone
    print(f"version {session.version}, accuracy {trainer.evaluate()['eval_accuracy']:.2f}")
    trainer.save_model("output")
