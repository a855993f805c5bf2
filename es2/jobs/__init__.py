"""Jobs as their folders show them: queue, launch, liveness, cancel. No torch and no models."""
