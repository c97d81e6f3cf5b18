"""How many examples a property gets: 200, the same every time; `nightly` draws 10,000 new ones."""
from hypothesis import HealthCheck, settings

settings.register_profile("proofs", max_examples=200, derandomize=True, database=None,
                          deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("nightly", settings.get_profile("proofs"), max_examples=10_000,
                          derandomize=False)
settings.load_profile("proofs")
