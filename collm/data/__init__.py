"""From text to scored rows: formats, tokenizer checks, assistants' log-probabilities, batches."""
