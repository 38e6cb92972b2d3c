"""Servers on a virtual clock: the service's own StepPolicy with a table of costs in place of engines."""
