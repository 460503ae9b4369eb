package layerdir

import "time"

// Moment is a time that tells whether the clock was set back since. What a
// file system's change times say of "before" and "after" is worth nothing if
// it was.
type Moment struct {
	Time  time.Time     `json:"time"`
	Boot  string        `json:"boot"`  // the boot it was in
	Since time.Duration `json:"since"` // from the boot, on a clock nobody sets
}

// Now returns this moment, as file systems tell it of what is changed from now
// on; the zero Moment where there is no such clock.
func (d *Dir) Now() Moment {
	up, ok := uptime()
	if !ok {
		return Moment{}
	}
	return Moment{Time: wall().UTC(), Boot: d.boot, Since: up}
}

// slack is how far the clocks may drift apart or be read apart.
const slack = time.Second

// Reliable returns the time of a moment, or the zero time if the clock may have
// been set back since: another boot, or less time went by on the clock than on
// the one that nobody sets.
func (d *Dir) Reliable(m Moment) time.Time {
	now := d.Now()
	if m.Boot == "" || m.Boot != now.Boot || now.Time.Sub(m.Time) < now.Since-m.Since-slack {
		return time.Time{}
	}
	return m.Time
}
