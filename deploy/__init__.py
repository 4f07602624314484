"""Images, Kubernetes, monitoring, capacity: parts of a deployment besides the server."""
