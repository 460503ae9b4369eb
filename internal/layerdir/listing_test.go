package layerdir

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func create(f folder, name string) error {
	_, err := f.append(name, "")
	return err
}

// TestListing changes a directory by another process's eyes and asks at once:
// what is there must never be said to be missing, however fast it came.
func TestListing(t *testing.T) {
	home := t.TempDir()
	d, other := mustOpen(t, home), mustOpen(t, home)
	const settle = 20 * time.Millisecond
	l := listing{settle: settle, local: true}
	for i := range 300 {
		name := fmt.Sprint("n", i%3)
		require.NoError(t, create(other.persist, name))
		require.False(t, l.lacks(&d.persist, name), "round %d: it is there", i)
		require.NoError(t, other.persist.unlink(name))
		if i%10 == 0 {
			time.Sleep(2 * settle) // old enough to be remembered
			_, known := d.persist.state()
			require.Equal(t, known, l.lacks(&d.persist, name), "round %d: it is gone", i)
		}
	}
	for i := range fewNames + 1 {
		require.NoError(t, create(other.persist, fmt.Sprint("many", i)))
	}
	time.Sleep(2 * settle)
	require.False(t, l.lacks(&d.persist, "none"), "too many names to remember")
	for i := range fewNames + 1 {
		require.False(t, l.lacks(&d.persist, fmt.Sprint("many", i)))
	}
}

// TestListingTick is that with what is asked before every change.
func TestListingTick(t *testing.T) {
	home := t.TempDir()
	d, other := mustOpen(t, home), mustOpen(t, home)
	for i := range 2000 {
		name := fmt.Sprint("n", i%3)
		require.NoError(t, create(other.persist, name))
		require.False(t, d.persistNames.lacks(&d.persist, name), "round %d: it is there", i)
		require.NoError(t, other.persist.unlink(name))
		d.persistNames.lacks(&d.persist, name)
		switch i % 100 {
		case 0:
			time.Sleep(tick + 2*time.Millisecond)
		case 50:
			time.Sleep(tick - 2*time.Millisecond)
		}
		d.persistNames.lacks(&d.persist, name)
	}
}
