from hypothesis import HealthCheck, settings

# Fixed examples: a failure in CI is the same failure on a desk.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")
