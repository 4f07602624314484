"""What benchmarks, fault scenarios and checks of the deployment share: workers, servers, load loops, adapters."""
