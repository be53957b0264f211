"""Makes gpu_gsm8k_lengths.txt: tokens of each of the first 1,000 records of GSM8K, question and answer, with GPT-2's tokenizer:
gpu_lengths.py TOKENIZER_FOLDER gsm8k/train.jsonl > benchmarks/gpu_gsm8k_lengths.txt"""
import json
import subprocess
import sys

import measure

with open(sys.argv[2]) as records:
    text = "".join(records.readlines()[:1000])
done = subprocess.run([measure.BINARY, "tokenize", f"--model.path={sys.argv[1]}", "--data.prompt_field=question", "--data.completion_field=answer"],
                      input=text, text=True, stdout=subprocess.PIPE, check=True)
print("\n".join(str(len(json.loads(line)["ids"])) for line in done.stdout.splitlines()))
