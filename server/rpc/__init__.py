"""The gRPC side: listening, authentication around each call, the services, and the way of a request."""
