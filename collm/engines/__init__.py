"""Engines that decode in sessions, and the coroutine that lets a base and its assistants write one answer together.

session.py         the protocol: open, extend, decode, close
transformers.py    a model of transformers in this process
vllm.py            a vLLM engine started by this process
http.py            any OpenAI-compatible completions server, as an assistant
collaboration.py   one request: a coroutine over a base session and up to K assistant sessions
"""
