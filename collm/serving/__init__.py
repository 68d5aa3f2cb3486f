"""The OpenAI-compatible server of a base and its assistants.

schema.py     requests, validated, and answers
service.py    engines, admission, one answer: tokens to text, stop strings, usage
breaker.py    a circuit breaker for each assistant
metrics.py    what Prometheus reads
app.py        routes, authentication, limits, errors
"""
