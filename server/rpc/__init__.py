"""The gRPC side, by the way of a request.

listening.py     the port and its limits, tls.py the certificates
interceptor.py   around each call: tenant, status, log line, counts, trace; anonymous.py around health and reflection
inference_service.py, adapters_service.py, usage_service.py, openinference/, health.py: the services
validation.py    a request's message to a job; parameters.py the parameters that few requests set
batch.py         samples of a request and items of a batch, side by side
generation.py    the job's way: turn, adapter version, engine; seeing.py the image of a text task before it
stream.py        between a generation and a reader that lags
pieces.py        long lists beside other calls
encoding.py      answers to messages; failures.py exceptions to statuses
"""
