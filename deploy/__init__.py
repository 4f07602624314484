"""Images, Kubernetes, monitoring, capacity: what a deployment needs beside the server."""
