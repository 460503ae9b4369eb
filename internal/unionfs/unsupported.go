//go:build !linux

package unionfs
