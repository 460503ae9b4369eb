package auto_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/layerfs/layerfs/auto"
)

// An open driver is described as Probe describes it.
func TestDescribe(t *testing.T) {
	d := open(t, t.TempDir(), &auto.Options{Driver: "vfs"})
	got := auto.Describe(d)
	assert.Equal(t, "vfs", got.Driver)
	assert.NoError(t, got.Err)
	assert.Equal(t, d.Features(), got.Features)
	for _, a := range got.Abilities() {
		if a.Name == "ConstantCreate" {
			assert.Equal(t, "a new layer is a full copy of its parent", a.Reason)
		}
	}
}
