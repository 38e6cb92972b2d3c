"""What the serving benches are made of: loads, systems, the engines alone, and tables with targets."""
