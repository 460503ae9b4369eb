package vfs_test

import (
	"testing"

	"github.com/layerfs/layerfs/drivertest"
)

func TestConformance(t *testing.T) { drivertest.Run(t, harness()) }
