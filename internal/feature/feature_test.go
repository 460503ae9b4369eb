package feature

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

func TestForce(t *testing.T) {
	forced := &layerfs.UnsupportedError{Feature: "x"}
	p := Prober{Force: map[Feature]error{NewMountAPI: nil, Reflink: forced}}
	dir := t.TempDir()
	assert.True(t, p.Has(NewMountAPI, ""))
	assert.Equal(t, error(forced), p.Probe(Reflink, dir))
	assert.False(t, p.Has(Reflink, dir))
}

func TestUnknown(t *testing.T) {
	var p Prober
	err := p.Probe("nonsense", t.TempDir())
	require.Error(t, err)
	require.NotErrorIs(t, err, errors.ErrUnsupported)
	assert.Empty(t, p.no)
}
