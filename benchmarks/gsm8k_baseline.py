"""TRL's SFTTrainer as it comes: gsm8k_baseline.py MODEL_FOLDER RECORDS.jsonl STEPS ROWS RANK PROGRESS
LoRA on all linear layers, bf16, padded samples. Writes a line to PROGRESS after every step; prints the real tokens (without
padding) of every step as JSON."""
import json
import sys
import tempfile

import datasets
import peft
import transformers
import trl

model, records, steps, rows, rank, progress = sys.argv[1:]
tokens = []


class CountingTrainer(trl.SFTTrainer):
    def compute_loss(self, model, inputs, *arguments, **keys):
        tokens.append(int(inputs["attention_mask"].sum()))
        return super().compute_loss(model, inputs, *arguments, **keys)


class Progress(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
        with open(progress, "a") as file:
            file.write(f"{len(tokens)}\n")


data = datasets.load_dataset("json", data_files=records, split="train")
data = data.rename_columns({"question": "prompt", "answer": "completion"})
with tempfile.TemporaryDirectory() as folder:
    trainer = CountingTrainer(
        model=model, train_dataset=data, callbacks=[Progress()],
        peft_config=peft.LoraConfig(r=int(rank), lora_alpha=int(rank), target_modules="all-linear", task_type="CAUSAL_LM"),
        args=trl.SFTConfig(output_dir=folder, max_steps=int(steps), per_device_train_batch_size=int(rows), bf16=True,
                           use_cpu=True, model_init_kwargs={"dtype": "bfloat16"}, report_to="none", save_strategy="no",
                           learning_rate=2e-4))
    trainer.train()
print(json.dumps(tokens))
