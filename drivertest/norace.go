//go:build !race

package drivertest

// raceEnabled tells that times mean nothing.
const raceEnabled = false
