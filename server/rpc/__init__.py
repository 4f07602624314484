"""The gRPC side, in the order in which a request passes through it.

listening.py     the port and its limits, tls.py the certificates
interceptor.py   around each call: tenant, status, log line, counts, trace; anonymous.py around health and reflection;
                 wrapping.py what both share
inference_service.py, adapters_service.py, usage_service.py, openinference/, health.py: the services
validation.py    a request's message to a job; parameters.py rare sampling parameters; own_types.py types that
                 requests bring
batch.py         samples of a request and items of a batch, side by side
generation.py    runs a job: turn, adapter version, engine; seeing.py first, the image of a text task
stream.py        buffer between a generation and a slow reader
pieces.py        long lists without blocking other calls
encoding.py      answers to messages, answers.py types of answers; failures.py exceptions to statuses
"""
